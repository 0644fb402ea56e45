"""The value loss in one launch, as the policy loss beside it: the gradient's divisor is left in `share`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.launch import launch
from ..common.tiles import tile
from ..common.triton_kl import bounded
from ..common.triton_moments import column_moments, merged, tile_moments
from ..common.triton_reduction import global_share, is_last, pick, put, row_factor, sum_of
from ..common.triton_tokens import aligned, known_multiple, lanes, load_mask, load_tokens, plain, row_bounds, row_shape, strides

# loss, clipped, tokens, mean and M2 of the residual, mean and M2 of the returns, mean of the values, sequences
ENTRIES = 9
PROGRAMS = 1024
_RUNTIME, _COLUMNS = ["rows", "length", *(f"s{i}" for i in range(4))], [f"c{i}" for i in range(4)]


@triton.jit
def _tile_loss(
    values, old_values, returns, mask, tensor_strides, row, at, out, lane, inside, factor, clip, grad_values, total
):  # fmt: skip
    """0.5 max((V - R)^2, (V_old + clamp(V - V_old) - R)^2) of a tile, added to the entries of its program; where the
    clipped error is the larger its gradient is 0."""
    s = tensor_strides
    m = load_mask(mask, row, at, s[6], s[7], lane, inside)
    counted = m != 0
    v = tl.where(counted, load_tokens(values, row, at, s[0], s[1], lane, inside), 0.0)
    r = tl.where(counted, load_tokens(returns, row, at, s[4], s[5], lane, inside), 0.0)
    error = v - r
    square = error * error
    if old_values is None:
        held = square
        use_held = held > square
    else:
        old = tl.where(counted, load_tokens(old_values, row, at, s[2], s[3], lane, inside), 0.0)
        moved = old + bounded(v - old, clip) - r
        held = moved * moved
        use_held = (tl.abs(v - old) > clip) & (held > square)  # inside the clamp they are one number
    if grad_values is not None:
        slope = tl.where(use_held, 0.0, error)
        tl.store(grad_values + out + lane, tl.where(counted, m * factor * slope, 0.0), mask=inside)
    loss = tl.sum(m * tl.where(use_held, held, square), 0)
    n = tl.sum(m, 0).to(tl.float64)
    residual_mean, residual_m2 = tile_moments(r - v, m, n)
    return_mean, return_m2 = tile_moments(r, m, n)
    value_mean, _ = tile_moments(v, m, n)
    residual_mean, residual_m2 = merged(total[2], total[3], total[4], n, residual_mean, residual_m2)
    return_mean, return_m2 = merged(total[2], total[5], total[6], n, return_mean, return_m2)
    value_mean, _ = merged(total[2], total[7], 0.0, n, value_mean, 0.0)
    return (
        total[0] + loss.to(tl.float64) * factor, total[1] + tl.sum(tl.where(use_held, m, 0.0), 0).to(tl.float64),
        total[2] + n, residual_mean, residual_m2, return_mean, return_m2, value_mean,
    )  # fmt: skip


@triton.jit
def _finish(
    total, sequences, partials, denominator, cu_seqlens, rows, length, loss, stats, share, counter,
    REDUCTION: tl.constexpr, POINTER: tl.constexpr,
):  # fmt: skip
    """The last program's columns as one: the loss, its statistics, and the divisor for the gradients."""
    for i in tl.static_range(8):
        put(partials, i, total[i])
    put(partials, 8, sequences)
    if is_last(counter):
        k = tl.arange(0, 8)
        sums, means, squares = column_moments(partials, 2, 8, 128)
        tokens = pick(sums, k, 2)
        row_count = sum_of(partials, 8, 1024)
        over = global_share(tokens, row_count, denominator, cu_seqlens, rows, length, REDUCTION, POINTER)
        some = tokens != 0
        n = tl.where(some, tokens, 1.0)
        residual_m2, return_m2 = pick(sums, k, 4) + pick(squares, k, 3), pick(sums, k, 6) + pick(squares, k, 5)
        explained = tl.where(return_m2 > 0, 1 - residual_m2 / tl.where(return_m2 > 0, return_m2, 1.0), 0.0)
        tl.store(share, over.to(tl.float32))
        tl.store(loss, (0.5 * pick(sums, k, 0) * over).to(tl.float32))
        tl.store(stats, tl.where(some, pick(sums, k, 1) / n, 0.0).to(tl.float32))
        tl.store(stats + 1, tl.where(some, explained, 0.0).to(tl.float32))
        tl.store(stats + 2, tl.where(some, pick(means, k, 7), 0.0).to(tl.float32))
        tl.store(stats + 3, tl.where(some, pick(means, k, 5), 0.0).to(tl.float32))
        tl.store(stats + 4, tokens.to(tl.float32))


@triton.jit
def _nothing():
    """The entries of no tokens."""
    x = tl.full([], 0.0, tl.float64)
    return x, x, x, x, x, x, x, x


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_COLUMNS)
def token_kernel(
    values, old_values, returns, mask, cu_seqlens, denominator, grad_values, loss, stats, share, counter, partials,
    rows, length, s0, c0, s1, c1, s2, c2, s3, c3, clip,
    REDUCTION: tl.constexpr, POINTER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """token-mean and token-sum: tiles of all rows, dealt out in turn."""
    length = known_multiple(length, ALIGNED)
    s0, s1 = known_multiple(s0, ALIGNED), known_multiple(s1, ALIGNED)
    s2, s3 = known_multiple(s2, ALIGNED), known_multiple(s3, ALIGNED)
    row_tiles = tl.cdiv(length, BLOCK)
    lane = lanes(BLOCK)
    total = _nothing()
    for i in range(tl.program_id(0), rows * row_tiles, tl.num_programs(0)):
        row, first = (i // row_tiles).to(tl.int64), i % row_tiles * BLOCK
        total = _tile_loss(
            values, old_values, returns, mask, (s0, c0, s1, c1, s2, c2, s3, c3), row, first, row * length + first, lane,
            lane < length - first, 1.0, clip, grad_values, total,
        )  # fmt: skip
    _finish(total, 0.0, partials, denominator, cu_seqlens, rows, length, loss, stats, share, counter, REDUCTION, POINTER)


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_COLUMNS)
def row_kernel(
    values, old_values, returns, mask, cu_seqlens, denominator, grad_values, loss, stats, share, counter, partials,
    rows, length, s0, c0, s1, c1, s2, c2, s3, c3, clip,
    REDUCTION: tl.constexpr, POINTER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Means over sequences: whole rows, dealt out in turn, its tokens counted first."""
    length = known_multiple(length, ALIGNED)
    s0, s1 = known_multiple(s0, ALIGNED), known_multiple(s1, ALIGNED)
    s2, s3 = known_multiple(s2, ALIGNED), known_multiple(s3, ALIGNED)
    lane = lanes(BLOCK)
    total = _nothing()
    sequences = tl.full([], 0.0, tl.float64)
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(i, tl.int64)
        start, size = row_bounds(row, cu_seqlens, length)
        tokens = tl.full([], 0.0, tl.float64)
        for first in range(0, size, BLOCK):
            tokens += tl.sum(load_mask(mask, row, start + first, s3, c3, lane, lane < size - first), 0).to(tl.float64)
        sequences += (tokens != 0).to(tl.float64)
        factor = row_factor(tokens, REDUCTION).to(tl.float32)
        for first in range(0, size, BLOCK):
            total = _tile_loss(
                values, old_values, returns, mask, (s0, c0, s1, c1, s2, c2, s3, c3), row, start + first,
                row * length + start + first, lane, lane < size - first, factor, clip, grad_values, total,
            )  # fmt: skip
    _finish(total, sequences, partials, denominator, cu_seqlens, rows, length, loss, stats, share, counter, REDUCTION, POINTER)


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor | None,
    returns: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    denominator: float | torch.Tensor | None,
    *,
    clip: float,
    reduction: int,
    grad_values: torch.Tensor | None,
    loss: torch.Tensor,
    stats: torch.Tensor,
    share: torch.Tensor,
    counter: torch.Tensor,
) -> None:
    """Loss and statistics; the gradient of the loss over `share`."""
    tokenwise = reduction < 2
    if values.numel() == 0:  # one program still has zeros to write
        tokenwise, reduction, rows, length = True, 0, 1, 0
    else:
        rows, length = row_shape(values, None if tokenwise else cu_seqlens)
    choice = tile("value_loss.tokens" if tokenwise else "value_loss.rows", values, length)
    programs = min(max(rows * triton.cdiv(length, choice["BLOCK"]), 1), PROGRAMS) if tokenwise else min(rows, PROGRAMS)
    launch(
        token_kernel if tokenwise else row_kernel, (programs,),
        values, old_values, returns, plain(mask), None if tokenwise else cu_seqlens, denominator, grad_values, loss, stats,
        share, counter, torch.empty((ENTRIES, programs), dtype=torch.float64, device=values.device), rows, length,
        *strides(values), *strides(old_values), *strides(returns), *strides(mask), float(clip),
        REDUCTION=reduction, POINTER=isinstance(denominator, torch.Tensor), 
        ALIGNED=aligned(length, values, old_values, returns, mask), **choice,
    )  # fmt: skip
