"""`kl_full` in Triton. KL(A||B) of two softmaxes in one read of each: the policy is B of the forward divergence, A of the
reverse one. The Jensen-Shannon divergence needs both normalisers first and reads twice."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import launch
from ..common.triton_rows import load_tile, row_start, row_tile, rows_of, store_tile, store_zeros, tile_columns
from ..common.triton_softmax import FLOOR, LN2, LOG2E, accumulate, anchor, log_of_sum, merge_lanes

_FORWARD, _JS = 0, 2  # directions
_STEPS = 8  # tiles of a row that one program of the backward writes
_RUNTIME = ["inner", "chunks"]


@triton.jit
def _counts(mask, row):
    if mask is None:
        return row >= 0
    else:
        return tl.load(mask + row) != 0


@triton.jit
def _moved(m, to, c):
    """(m - to) c, the shift of a sum to another reference; 0 where nothing was seen yet, or nothing but -inf."""
    return tl.where(m == float("-inf"), 0.0, tl.maximum((m - to) * c, -1e30))


@triton.jit
def _rescaled(w, s, shift, other_shift):
    """w = Σ 2^a (a - b) and s = Σ 2^a where a moves by `shift` and b by `other_shift`. w may be inf, of terms that are 0 in
    the end."""
    factor = tl.exp2(tl.maximum(shift, FLOOR))
    return tl.where(factor == 0, 0.0, (w + s * (shift - other_shift)) * factor), s * factor


@triton.jit
def _accumulate_pair(x, y, ma, sa, mb, sb, w, c):
    """Tiles of A's and B's logits into the lanes' maxima, sums and w = Σ 2^a (a - b), a and b from their maxima."""
    high_a = tl.maximum(ma, tl.max(tl.max(x, 2), 1))
    high_b = tl.maximum(mb, tl.max(tl.max(y, 2), 1))
    base_a, base_b = anchor(high_a), anchor(high_b)
    shift_b = _moved(mb, base_b, c)
    w, sa = _rescaled(w, sa, _moved(ma, base_a, c), shift_b)
    a = (x - base_a[:, None, None]) * c
    b = (y - base_b[:, None, None]) * c
    e = tl.exp2(a)
    term = tl.where(e > 0, e * (a - b), e)  # e = 0 counts nothing, NaN stays
    sb = sb * tl.exp2(tl.maximum(shift_b, FLOOR)) + tl.sum(tl.sum(tl.exp2(b), 2), 1)
    return high_a, sa + tl.sum(tl.sum(e, 2), 1), high_b, sb, w + tl.sum(tl.sum(term, 2), 1)


@triton.jit
def _merge_pairs(ma, sa, mb, sb, w, c):
    high_a, high_b = tl.max(ma, 0), tl.max(mb, 0)
    shift_b = _moved(mb, anchor(high_b), c)
    w, sa = _rescaled(w, sa, _moved(ma, anchor(high_a), c), shift_b)
    sb = sb * tl.exp2(tl.maximum(shift_b, FLOOR))
    return (
        high_a, tl.sum(sa.to(tl.float64), 0), high_b, tl.sum(sb.to(tl.float64), 0), tl.sum(w.to(tl.float64), 0),
    )  # fmt: skip


@triton.jit
def _write_stats(stats, row, max_a, log_a, max_b, log_b, SWAPPED: tl.constexpr):
    """(max, log-sum) of the policy, then of the reference."""
    if stats is not None:
        stats += row.to(tl.int64) * 4
        tl.store(stats + 2 * SWAPPED, max_a)
        tl.store(stats + 2 * SWAPPED + 1, log_a.to(tl.float32))
        tl.store(stats + 2 - 2 * SWAPPED, max_b)
        tl.store(stats + 3 - 2 * SWAPPED, log_b.to(tl.float32))


@triton.jit
def _read_stats(stats, row, SWAPPED: tl.constexpr):
    """A's and B's maximum and log-sum, that in units of log 2."""
    stats += row.to(tl.int64) * 4
    max_a, log_a = tl.load(stats + 2 * SWAPPED), tl.load(stats + 2 * SWAPPED + 1)
    max_b, log_b = tl.load(stats + 2 - 2 * SWAPPED), tl.load(stats + 3 - 2 * SWAPPED)
    return max_a, log_a * LOG2E, max_b, log_b * LOG2E


@triton.jit
def _skip(out, stats, row):
    tl.store(out + row, 0.0)
    if stats is not None:
        for i in range(4):
            tl.store(stats + row.to(tl.int64) * 4 + i, 0.0)


@triton.jit(do_not_specialize=_RUNTIME)
def _divergence(
    A, B, mask, out, stats, inner, a_outer_stride, a_inner_stride, b_outer_stride, b_inner_stride, vocab, scale,
    SWAPPED: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """KL(A||B) = Σ 2^a (a - b) / s_A - log s_A + log s_B, in units of log 2 but for the logarithms."""
    row = tl.program_id(0)
    if _counts(mask, row):
        A += row_start(row, inner, a_outer_stride, a_inner_stride, VECTOR)
        B += row_start(row, inner, b_outer_stride, b_inner_stride, VECTOR)
        c = scale * LOG2E
        ma = tl.full((LANES,), float("-inf"), tl.float32)
        mb = ma
        sa = tl.zeros((LANES,), tl.float32)
        sb = sa
        w = sa
        columns = tile_columns(BLOCK, LANES, VECTOR)
        full = vocab // BLOCK * BLOCK
        for begin in range(0, full, BLOCK):
            x = load_tile(A, begin + columns, vocab, False)
            y = load_tile(B, begin + columns, vocab, False)
            ma, sa, mb, sb, w = _accumulate_pair(x, y, ma, sa, mb, sb, w, c)
        if full < vocab:
            x = load_tile(A, full + columns, vocab, True)
            y = load_tile(B, full + columns, vocab, True)
            ma, sa, mb, sb, w = _accumulate_pair(x, y, ma, sa, mb, sb, w, c)
        max_a, total_a, max_b, total_b, weighted = _merge_pairs(ma, sa, mb, sb, w, c)
        log_a, log_b = log_of_sum(total_a), log_of_sum(total_b)
        tl.store(out + row, (weighted / total_a * LN2 - log_a + log_b).to(tl.float32))
        _write_stats(stats, row, max_a, log_a, max_b, log_b, SWAPPED)
    else:
        _skip(out, stats, row)


@triton.jit
def _log_ratios(x, y, max_a, log_a, max_b, log_b, c):
    """log2 of A, of B, and of A/B."""
    a, b = (x - max_a) * c, (y - max_b) * c
    return a - log_a, b - log_b, (a - b) - (log_a - log_b)


@triton.jit
def _against_average(ratio):
    """log2 A/M and log2 B/M for M = (A + B) / 2, from log2 A/B."""
    rest = 1 - tl.log2(1 + tl.exp2(-tl.abs(ratio)))
    return rest + tl.minimum(ratio, 0.0), rest - tl.maximum(ratio, 0.0)


@triton.jit
def _product(e, value):
    """e · value, 0 where e is 0."""
    return tl.where(e > 0, e * value, e)


@triton.jit
def _js_tile(A, B, columns, vocab, max_a, log_a, max_b, log_b, c, TAIL: tl.constexpr):
    x = load_tile(A, columns, vocab, TAIL)
    y = load_tile(B, columns, vocab, TAIL)
    a, b, ratio = _log_ratios(x, y, max_a, log_a, max_b, log_b, c)
    from_a, from_b = _against_average(ratio)
    to_a, to_b = _product(tl.exp2(a), from_a), _product(tl.exp2(b), from_b)
    return tl.sum(tl.sum(to_a, 2), 1), tl.sum(tl.sum(to_b, 2), 1)


@triton.jit
def _js_sums(A, B, vocab, max_a, log_a, max_b, log_b, c, BLOCK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """KL(A||M) and KL(B||M), M = (A + B) / 2."""
    columns = tile_columns(BLOCK, LANES, VECTOR)
    sum_a = tl.zeros((LANES,), tl.float32)
    sum_b = sum_a
    full = vocab // BLOCK * BLOCK
    for begin in range(0, full, BLOCK):
        to_a, to_b = _js_tile(A, B, begin + columns, vocab, max_a, log_a, max_b, log_b, c, False)
        sum_a += to_a
        sum_b += to_b
    if full < vocab:
        to_a, to_b = _js_tile(A, B, full + columns, vocab, max_a, log_a, max_b, log_b, c, True)
        sum_a += to_a
        sum_b += to_b
    return tl.sum(sum_a.to(tl.float64), 0) * LN2, tl.sum(sum_b.to(tl.float64), 0) * LN2


@triton.jit(do_not_specialize=_RUNTIME)
def _js(
    A, B, mask, out, stats, inner, a_outer_stride, a_inner_stride, b_outer_stride, b_inner_stride, vocab, scale,
    BLOCK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """(KL(A||M) + KL(B||M)) / 2, M = (A + B) / 2."""
    row = tl.program_id(0)
    if _counts(mask, row):
        A += row_start(row, inner, a_outer_stride, a_inner_stride, VECTOR)
        B += row_start(row, inner, b_outer_stride, b_inner_stride, VECTOR)
        c = scale * LOG2E
        ma = tl.full((LANES,), float("-inf"), tl.float32)
        mb = ma
        sa = tl.zeros((LANES,), tl.float32)
        sb = sa
        columns = tile_columns(BLOCK, LANES, VECTOR)
        full = vocab // BLOCK * BLOCK
        for begin in range(0, full, BLOCK):
            ma, sa, _ = accumulate(load_tile(A, begin + columns, vocab, False), ma, sa, sa, c, False)
            mb, sb, _ = accumulate(load_tile(B, begin + columns, vocab, False), mb, sb, sb, c, False)
        if full < vocab:
            ma, sa, _ = accumulate(load_tile(A, full + columns, vocab, True), ma, sa, sa, c, False)
            mb, sb, _ = accumulate(load_tile(B, full + columns, vocab, True), mb, sb, sb, c, False)
        max_a, total_a, _ = merge_lanes(ma, sa, sa, c, False)
        max_b, total_b, _ = merge_lanes(mb, sb, sb, c, False)
        log_a, log_b = log_of_sum(total_a), log_of_sum(total_b)
        to_a, to_b = _js_sums(
            A, B, vocab, max_a, (log_a * LOG2E).to(tl.float32), max_b, (log_b * LOG2E).to(tl.float32), c, BLOCK, LANES, VECTOR
        )
        tl.store(out + row, ((to_a + to_b) * 0.5).to(tl.float32))
        _write_stats(stats, row, max_a, log_a, max_b, log_b, 0)
    else:
        _skip(out, stats, row)


@triton.jit(do_not_specialize=_RUNTIME)
def _js_centres(
    A, B, mask, stats, grad, centres, inner, a_outer_stride, a_inner_stride, b_outer_stride, b_inner_stride, vocab, scale,
    BLOCK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """(rows, 2): KL(A||M) and KL(B||M) of the rows that have a gradient."""
    row = tl.program_id(0)
    if _counts(mask, row) & (tl.load(grad + row) != 0):
        A += row_start(row, inner, a_outer_stride, a_inner_stride, VECTOR)
        B += row_start(row, inner, b_outer_stride, b_inner_stride, VECTOR)
        max_a, log_a, max_b, log_b = _read_stats(stats, row, 0)
        to_a, to_b = _js_sums(A, B, vocab, max_a, log_a, max_b, log_b, scale * LOG2E, BLOCK, LANES, VECTOR)
        tl.store(centres + row.to(tl.int64) * 2, to_a.to(tl.float32))
        tl.store(centres + row.to(tl.int64) * 2 + 1, to_b.to(tl.float32))


@triton.jit
def _gradient_tile(
    A, B, grad_a, grad_b, columns, vocab, max_a, log_a, max_b, log_b, centre_a, centre_b, factor, c,
    JS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    x = load_tile(A, columns, vocab, TAIL)
    y = load_tile(B, columns, vocab, TAIL)
    a, b, ratio = _log_ratios(x, y, max_a, log_a, max_b, log_b, c)
    a, b = tl.exp2(a), tl.exp2(b)
    from_a, from_b = ratio, ratio
    if JS:
        from_a, from_b = _against_average(ratio)
    if grad_a is not None:
        store_tile(grad_a, columns, _product(a, from_a * LN2 - centre_a) * factor, vocab, TAIL)
    if grad_b is not None:
        if JS:
            store_tile(grad_b, columns, _product(b, from_b * LN2 - centre_b) * factor, vocab, TAIL)
        else:
            store_tile(grad_b, columns, (b - a) * factor, vocab, TAIL)


@triton.jit(do_not_specialize=_RUNTIME)
def _gradient(
    A, B, mask, stats, centres, grad, grad_a, grad_b, inner, a_outer_stride, a_inner_stride, b_outer_stride, b_inner_stride,
    grad_a_outer_stride, grad_a_inner_stride, grad_b_outer_stride, grad_b_inner_stride, vocab, chunks, scale,
    SWAPPED: tl.constexpr, JS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """KL(A||B): dA = A (log A/B - KL), dB = B - A. js: dA = A (log A/M - KL(A||M)) / 2, dB likewise. All over T.
    STEPS tiles of a row a program."""
    row = tl.program_id(0) // chunks
    begin = tl.program_id(0) % chunks * (STEPS * BLOCK)
    end = tl.minimum(begin + STEPS * BLOCK, vocab)
    if grad_a is not None:
        grad_a += row_start(row, inner, grad_a_outer_stride, grad_a_inner_stride, VECTOR)
    if grad_b is not None:
        grad_b += row_start(row, inner, grad_b_outer_stride, grad_b_inner_stride, VECTOR)
    g = tl.load(grad + row)
    if _counts(mask, row) & (g != 0):
        A += row_start(row, inner, a_outer_stride, a_inner_stride, VECTOR)
        B += row_start(row, inner, b_outer_stride, b_inner_stride, VECTOR)
        max_a, log_a, max_b, log_b = _read_stats(stats, row, SWAPPED)
        if JS:
            factor = g * scale * 0.5
            centre_a = tl.load(centres + row.to(tl.int64) * 2)
            centre_b = tl.load(centres + row.to(tl.int64) * 2 + 1)
        else:
            factor = g * scale
            centre_a = tl.load(centres + row)
            centre_b = centre_a
        c = scale * LOG2E
        columns = tile_columns(BLOCK, LANES, VECTOR)
        full = end // BLOCK * BLOCK
        for at in range(begin, full, BLOCK):
            _gradient_tile(
                A, B, grad_a, grad_b, at + columns, vocab, max_a, log_a, max_b, log_b, centre_a, centre_b, factor, c, JS, False
            )
        if full < end:
            _gradient_tile(
                A, B, grad_a, grad_b, full + columns, vocab, max_a, log_a, max_b, log_b, centre_a, centre_b, factor, c, JS, True
            )
    else:
        if grad_a is not None:
            store_zeros(grad_a, begin, end, BLOCK, LANES, VECTOR)
        if grad_b is not None:
            store_zeros(grad_b, begin, end, BLOCK, LANES, VECTOR)


def _strides(t: Tensor | None) -> tuple[int, int]:
    return (0, 0) if t is None else rows_of(t)[1:]


def kl_full_forward(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, *, direction: int, temperature: float, out: Tensor,
    stats: Tensor | None,
) -> None:  # fmt: skip
    """The divergences (rows), and (rows, 4) the maximum and the log-sum of the policy's and of the reference's rows."""
    vocab = logits.shape[-1]
    chosen = row_tile("kl_full.forward", logits, ref_logits)
    a, b = (ref_logits, logits) if direction == _FORWARD else (logits, ref_logits)
    seen = None if mask is None else mask.view(torch.uint8)
    arguments = (a, b, seen, out, stats, rows_of(logits)[0], *_strides(a), *_strides(b), vocab, 1 / temperature)
    if direction == _JS:
        launch(_js, (out.numel(),), *arguments, **chosen)
    else:
        launch(_divergence, (out.numel(),), *arguments, SWAPPED=int(direction == _FORWARD), **chosen)


def kl_full_backward(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, *, direction: int, temperature: float, out: Tensor, stats: Tensor,
    grad: Tensor, grad_logits: Tensor | None, grad_ref_logits: Tensor | None,
) -> None:  # fmt: skip
    """The gradients that are wanted, from the upstream (rows)."""
    vocab, rows = logits.shape[-1], out.numel()
    wanted = [t for t in (grad_logits, grad_ref_logits) if t is not None]
    a, b, grad_a, grad_b = logits, ref_logits, grad_logits, grad_ref_logits
    if direction == _FORWARD:
        a, b, grad_a, grad_b = b, a, grad_b, grad_a
    seen = None if mask is None else mask.view(torch.uint8)
    inner, centres = rows_of(logits)[0], out
    if direction == _JS:
        centres = torch.empty((rows, 2), dtype=torch.float32, device=out.device)
        launch(
            _js_centres, (rows,), a, b, seen, stats, grad, centres, inner, *_strides(a), *_strides(b), vocab, 1 / temperature,
            **row_tile("kl_full.forward", logits, ref_logits),
        )  # fmt: skip
    chosen = row_tile("kl_full.backward", logits, ref_logits, *wanted)
    chunks = triton.cdiv(vocab, _STEPS * chosen["BLOCK"])
    launch(
        _gradient, (rows * chunks,), a, b, seen, stats, centres, grad, grad_a, grad_b, inner, *_strides(a), *_strides(b),
        *_strides(grad_a), *_strides(grad_b), vocab, chunks, 1 / temperature, SWAPPED=int(direction == _FORWARD),
        JS=direction == _JS, STEPS=_STEPS, **chosen,
    )  # fmt: skip
