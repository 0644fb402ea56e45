"""The policy losses in one launch: loss, statistics and the gradient up to the divisor that all tokens decide, which is
known when the last program ends and left in `share`. Mathematics: cpu.cpp beside this file, whose names these are."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.launch import launch
from ..common.tiles import tile
from ..common.triton_kl import accurate_exp, bounded, expm1_minus_x, kl_clamped
from ..common.triton_reduction import global_share, is_last, largest_of, pick, put, row_factor, sum_of, total_of
from ..common.triton_tokens import (
    aligned,
    fold,
    fold_max,
    known_multiple,
    lanes,
    load_mask,
    load_tokens,
    plain,
    row_bounds,
    row_shape,
    strides,
)

STATS = 15
PROGRAMS = 1024  # that share all tiles or rows: a few waves, and few columns for the last one to add up
_RUNTIME, _COLUMNS = ["rows", "length", *(f"s{i}" for i in range(7))], [f"c{i}" for i in range(7)]
SUMS = 2 + STATS  # a program's column: the loss, an entry for each statistic, the sequences with a token that counts


@triton.jit
def _importance(ratio, low, high, CORRECTION: tl.constexpr):
    """The weight of an importance ratio: tis, mis, icepop."""
    if CORRECTION == 1:
        return tl.where(ratio < high, ratio, high)
    elif CORRECTION == 2:
        return tl.where(ratio <= high, ratio, 0.0)
    else:
        return tl.where((ratio <= high) & (ratio >= low), ratio, 0.0)


@triton.jit
def _objective(
    logprob, A, d, r, inside, mean_A, ratio_grad, mean_weight, numbers, KIND: tl.constexpr
):  # fmt: skip
    """To be maximised: (value, d value / d logprob) of each token before any correction, and its clips low, high, dual."""
    clip_low, clip_high, floor, ceiling, dual_clip, delta, tau_pos, tau_neg = numbers
    zero = tl.zeros(A.shape, tl.float32)
    low, high, dual = zero, zero, zero
    held_ratio = tl.where(r > ceiling, ceiling, tl.where(r < floor, floor, r))
    if KIND == 0 or KIND == 4:
        some = A != 0  # r may be inf, and 0 * inf is not 0
        free = tl.where(some, A * tl.where(r > delta, delta, r), 0.0)
        held = A * held_ratio
        clipped = held < free
        moves = tl.where(clipped, (r <= ceiling) & (r >= floor), r <= delta)
        value = tl.where(clipped, held, free)
        slope = tl.where(moves & some, A * r * inside, 0.0)
        high, low = tl.where(clipped & (A > 0), 1.0, 0.0), tl.where(clipped & (A < 0), 1.0, 0.0)
        least = tl.where(A < 0, A * dual_clip, float("-inf"))
        below = value < least
        value, slope = tl.where(below, least, value), tl.where(below, 0.0, slope)
        dual = tl.where(below, 1.0, 0.0)
        if KIND == 4:
            slope = zero + ratio_grad
    elif KIND == 1:
        value, slope = A * logprob, A
    elif KIND == 2:
        slope = A * held_ratio
        value = slope * logprob
        high, low = tl.where(r > ceiling, 1.0, 0.0), tl.where(r < floor, 1.0, 0.0)
    elif KIND == 3:
        tau = tl.where(A > 0, tau_pos, tau_neg)
        gate = 1.0 / (1.0 + accurate_exp(-tau * (r - 1.0)))
        bend = gate * (1.0 - gate)
        value = A * gate * 4.0 / tau
        slope = tl.where(bend > 0, A * bend * 4.0 * r * inside, 0.0)
    else:
        high, low = tl.where((A > 0) & (d > clip_high), 1.0, 0.0), tl.where((A < 0) & (d < -clip_low), 1.0, 0.0)
        value = zero + mean_A * r
        slope = tl.where(A != 0, value * mean_weight * (1.0 - high) * (1.0 - low), 0.0)
    return value, slope, low, high, dual


@triton.jit
def _tile_loss(
    tensors, tensor_strides, row, at, out, lane, inside, plan, numbers, bounds, coefficients, grad_logprobs, grad_entropy,
    KIND: tl.constexpr, CORRECTION: tl.constexpr, LEVEL: tl.constexpr, KL_KIND: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile and its sums, folded, in the order of the statistics; entries 5, 6, 13 are maxima."""
    logprobs, old_logprobs, advantages, mask, rollout_logprobs, ref_logprobs, entropy = tensors
    s = tensor_strides
    factor, row_ratio, ratio_grad, mean_A, mean_weight, row_weight, row_corrected = plan
    ratio_clamp, correction_low, correction_high = bounds
    kl_coef, entropy_coef = coefficients
    m = load_mask(mask, row, at, s[6], s[7], lane, inside)
    counted = m != 0
    # what is not counted may hold anything: it becomes a token of ratio 1 and advantage 0
    lp = tl.where(counted, load_tokens(logprobs, row, at, s[0], s[1], lane, inside), 0.0)
    old = tl.where(counted, load_tokens(old_logprobs, row, at, s[2], s[3], lane, inside), 0.0)
    A = tl.where(counted, load_tokens(advantages, row, at, s[4], s[5], lane, inside), 0.0)
    log_ratio = lp - old
    d = bounded(log_ratio, ratio_clamp)
    kept = tl.where(tl.abs(log_ratio) <= ratio_clamp, 1.0, 0.0)
    r = accurate_exp(d)
    k3 = fold(m * expm1_minus_x(d, r))
    if KIND >= 4:
        r = tl.zeros(d.shape, tl.float32) + row_ratio
    value, slope, low, high, dual = _objective(lp, A, log_ratio, r, kept, mean_A, ratio_grad, mean_weight, numbers, KIND)
    tokens = fold(m)
    absent = tl.zeros(tokens.shape, tl.float32)
    mismatch, mismatch_max, corrected, weight = absent, absent, tokens * row_corrected, tokens * row_weight
    w = tl.zeros(d.shape, tl.float32) + row_weight
    if rollout_logprobs is not None:
        rollout = load_tokens(rollout_logprobs, row, at, s[8], s[9], lane, inside)
        difference = old - tl.where(counted, rollout, 0.0)
        mismatch, mismatch_max = fold(m * tl.abs(difference)), fold_max(tl.abs(difference))
        if CORRECTION != 0 and LEVEL == 0:
            ratio = accurate_exp(bounded(difference, 20.0))
            w = _importance(ratio, correction_low, correction_high, CORRECTION)
            corrected, weight = fold(tl.where(w != ratio, m, 0.0)), fold(m * w)
    loss = -w * value
    slope = -slope if KIND >= 4 else -w * slope  # of a sequence's ratio, the slope has its weights in it already
    ref_kl, H_sum = absent, absent
    if ref_logprobs is not None:
        ref = load_tokens(ref_logprobs, row, at, s[10], s[11], lane, inside)
        kl, kl_slope = kl_clamped(lp - tl.where(counted, ref, 0.0), float("inf"), float("inf"), KL_KIND, False)
        ref_kl = fold(m * kl)
        loss += kl_coef * kl
        slope += kl_coef * kl_slope
    if entropy is not None:
        H = tl.where(counted, load_tokens(entropy, row, at, s[12], s[13], lane, inside), 0.0)
        H_sum = fold(m * H)
        loss -= entropy_coef * H
    m_factor = m * factor
    if grad_logprobs is not None:
        tl.store(grad_logprobs + out + lane, tl.where(counted, m_factor * slope, 0.0), mask=inside)
    if grad_entropy is not None:
        tl.store(grad_entropy + out + lane, -m_factor * entropy_coef, mask=inside)
    return (
        fold(m_factor * loss), fold(m * low), fold(m * high), fold(m * dual), fold(m * r),
        fold_max(tl.where(counted, -r, float("-inf"))), fold_max(tl.where(counted, r, float("-inf"))),
        fold(-m * d), k3, ref_kl, H_sum, tokens, mismatch, mismatch_max, weight, corrected,
    )  # fmt: skip


@triton.jit
def _nothing(LANES: tl.constexpr):
    """What `_tile_loss` returns of no tokens."""
    x, least = tl.zeros([LANES], tl.float32), tl.full([LANES], float("-inf"), tl.float32)
    return x, x, x, x, x, least, least, x, x, x, x, x, x, x, x, x


@triton.jit
def _together(x, y):
    """Sums of two tiles as one."""
    return (
        x[0] + y[0], x[1] + y[1], x[2] + y[2], x[3] + y[3], x[4] + y[4], tl.maximum(x[5], y[5]), tl.maximum(x[6], y[6]),
        x[7] + y[7], x[8] + y[8], x[9] + y[9], x[10] + y[10], x[11] + y[11], x[12] + y[12], tl.maximum(x[13], y[13]),
        x[14] + y[14], x[15] + y[15],
    )  # fmt: skip


@triton.jit
def _finish(
    column, sequences, partials, denominator, cu_seqlens, rows, length, mismatched: tl.constexpr, loss, stats, share, counter,
    REDUCTION: tl.constexpr, POINTER: tl.constexpr,
):  # fmt: skip
    """The last program's columns added up: the loss, its statistics, and the divisor for the gradients."""
    for i in tl.static_range(16):
        put(partials, i, tl.max(column[i], 0) if i == 5 or i == 6 or i == 13 else tl.sum(column[i], 0))
    put(partials, 16, sequences)
    if is_last(counter):
        k = tl.arange(0, 16)
        total = total_of(partials, 16, 128)
        tokens = pick(total, k, 11)
        row_count = sum_of(partials, 16, 1024)
        over = global_share(tokens, row_count, denominator, cu_seqlens, rows, length, REDUCTION, POINTER)
        some = tokens != 0
        tl.store(share, over.to(tl.float32))
        tl.store(loss, tl.where(some, pick(total, k, 0) * over, 0.0).to(tl.float32))
        value = tl.where(k == 11, tokens, total / tl.where(some, tokens, 1.0)).to(tl.float32)
        value = tl.where(k == 5, -largest_of(partials, 5, 1024), value)
        value = tl.where(k == 6, largest_of(partials, 6, 1024), value)
        if mismatched:
            value = tl.where(k == 13, largest_of(partials, 13, 1024), value)
        tl.store(stats + k - 1, tl.where(some, value, 0.0), mask=k > 0)


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_COLUMNS)
def token_kernel(
    logprobs, old_logprobs, advantages, mask, rollout_logprobs, ref_logprobs, entropy, cu_seqlens, denominator,
    grad_logprobs, grad_entropy, loss, stats, share, counter, partials, rows, length,
    s0, c0, s1, c1, s2, c2, s3, c3, s4, c4, s5, c5, s6, c6,
    clip_low, clip_high, floor, ceiling, dual_clip, ratio_clamp, delta, tau_pos, tau_neg, correction_low, correction_high,
    kl_coef, entropy_coef,
    KIND: tl.constexpr, CORRECTION: tl.constexpr, LEVEL: tl.constexpr, KL_KIND: tl.constexpr, REDUCTION: tl.constexpr,
    POINTER: tl.constexpr, PER_ROW: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What needs nothing of a token's sequence: tiles of all rows, dealt out in turn."""
    length = known_multiple(length, ALIGNED)
    s0, s1, s2 = known_multiple(s0, ALIGNED), known_multiple(s1, ALIGNED), known_multiple(s2, ALIGNED and not PER_ROW)
    s3, s4 = known_multiple(s3, ALIGNED), known_multiple(s4, ALIGNED)
    s5, s6 = known_multiple(s5, ALIGNED), known_multiple(s6, ALIGNED)
    row_tiles = tl.cdiv(length, BLOCK)
    lane = lanes(BLOCK)
    column = _nothing(BLOCK // 4)
    for i in range(tl.program_id(0), rows * row_tiles, tl.num_programs(0)):
        row, first = (i // row_tiles).to(tl.int64), i % row_tiles * BLOCK
        tile_sums = _tile_loss(
            (logprobs, old_logprobs, advantages, mask, rollout_logprobs, ref_logprobs, entropy),
            (s0, c0, s1, c1, s2, c2, s3, c3, s4, c4, s5, c5, s6, c6), row, first, row * length + first, lane,
            lane < length - first, (1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0),
            (clip_low, clip_high, floor, ceiling, dual_clip, delta, tau_pos, tau_neg),
            (ratio_clamp, correction_low, correction_high), (kl_coef, entropy_coef), grad_logprobs, grad_entropy,
            KIND, CORRECTION, LEVEL, KL_KIND,
        )  # fmt: skip
        column = _together(column, tile_sums)
    _finish(
        column, 0.0, partials, denominator, cu_seqlens, rows, length, rollout_logprobs is not None, loss, stats, share, counter,
        REDUCTION, POINTER,
    )  # fmt: skip


@triton.jit
def _row_sums(
    tensors, tensor_strides, row, start, size, bounds, clip_low, clip_high,
    KIND: tl.constexpr, CORRECTION: tl.constexpr, LEVEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Over a row: its weights' sum, and what a sequence's ratio, advantage and correction are made of."""
    logprobs, old_logprobs, advantages, mask, rollout_logprobs = tensors
    s = tensor_strides
    correction_low, correction_high = bounds
    tokens, log_ratio, held, positive = (tl.full([], 0.0, tl.float64),) * 4
    negative, advantage, weights, mismatch = (tl.full([], 0.0, tl.float64),) * 4
    lane = lanes(BLOCK)
    for first in range(0, size, BLOCK):
        at, inside = start + first, lane < size - first
        m = load_mask(mask, row, at, s[6], s[7], lane, inside)
        counted = m != 0
        tokens += tl.sum(m, 0).to(tl.float64)
        if KIND >= 4 or (CORRECTION != 0 and LEVEL != 0):
            old = tl.where(counted, load_tokens(old_logprobs, row, at, s[2], s[3], lane, inside), 0.0)
        if CORRECTION != 0:
            rollout = tl.where(counted, load_tokens(rollout_logprobs, row, at, s[8], s[9], lane, inside), 0.0)
            if LEVEL != 0:
                mismatch += tl.sum(m * (old - rollout), 0).to(tl.float64)
        if KIND >= 4:
            A = tl.where(counted, load_tokens(advantages, row, at, s[4], s[5], lane, inside), 0.0)
            d = tl.where(counted, load_tokens(logprobs, row, at, s[0], s[1], lane, inside), 0.0) - old
            weight = m
            if CORRECTION != 0 and LEVEL == 0:
                ratio = accurate_exp(bounded(old - rollout, 20.0))
                weight = m * _importance(ratio, correction_low, correction_high, CORRECTION)
            if KIND == 4:
                log_ratio += tl.sum(m * d, 0).to(tl.float64)
                positive += tl.sum(tl.where(A > 0, weight * A, 0.0), 0).to(tl.float64)
                negative += tl.sum(tl.where(A < 0, weight * A, 0.0), 0).to(tl.float64)
            else:
                up, down = tl.where(d > clip_high, clip_high, d), tl.where(d < -clip_low, -clip_low, d)
                held += tl.sum(m * tl.where(A > 0, up, tl.where(A < 0, down, 0.0)), 0).to(tl.float64)
                advantage += tl.sum(m * A, 0).to(tl.float64)
                weights += tl.sum(weight, 0).to(tl.float64)
    return tokens, log_ratio, held, positive, negative, advantage, weights, mismatch


@triton.jit
def _close_row(
    sums, numbers, bounds,
    KIND: tl.constexpr, CORRECTION: tl.constexpr, LEVEL: tl.constexpr, REDUCTION: tl.constexpr,
):  # fmt: skip
    """A row's sums to what its tokens need of them: weight, ratio, gspo's slope, gmpo's means, the sequence's correction."""
    tokens, log_ratio, held, positive, negative, advantage, weights, mismatch = sums
    floor, ceiling, dual_clip, delta = numbers
    ratio_clamp, correction_low, correction_high = bounds
    one = tl.full([], 1.0, tl.float64)
    zero = one * 0
    n = tl.where(tokens != 0, tokens, 1.0)
    correction, uncorrected, ratio, ratio_grad, mean_A, mean_weight = one, one, one, zero, zero, one
    if CORRECTION != 0 and LEVEL != 0:
        uncorrected = tl.exp(bounded(mismatch / n if LEVEL == 2 else mismatch, 20.0))
        correction = _importance(uncorrected, correction_low, correction_high, CORRECTION)
    if KIND == 4:
        mean = log_ratio / n
        ratio = tl.exp(bounded(mean, ratio_clamp))
        # the objective is A min(free, held) for A > 0 and A min(max(free, held), dual_clip) for A < 0
        free = tl.where(ratio < delta, ratio, delta)
        within = tl.where(ratio < floor, floor, tl.where(ratio > ceiling, ceiling, ratio))
        free_moves, held_moves = ratio <= delta, (ratio >= floor) & (ratio <= ceiling)
        up = tl.where(free <= within, free_moves, held_moves)
        down = tl.where(free >= within, free_moves, held_moves) & (tl.where(free > within, free, within) <= dual_clip)
        slope = tl.where(up, positive, 0.0) + tl.where(down, negative, 0.0)
        ratio_grad = tl.where(tl.abs(mean) <= ratio_clamp, slope * ratio / n * correction, 0.0)
    elif KIND == 5:
        ratio = tl.exp(held / n)
        mean_A = advantage / n
        mean_weight = weights / n * correction
    return (
        row_factor(tokens, REDUCTION).to(tl.float32), ratio.to(tl.float32), ratio_grad.to(tl.float32),
        mean_A.to(tl.float32), mean_weight.to(tl.float32), correction.to(tl.float32),
        (correction != uncorrected).to(tl.float32),
    )  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_COLUMNS)
def row_kernel(
    logprobs, old_logprobs, advantages, mask, rollout_logprobs, ref_logprobs, entropy, cu_seqlens, denominator,
    grad_logprobs, grad_entropy, loss, stats, share, counter, partials, rows, length,
    s0, c0, s1, c1, s2, c2, s3, c3, s4, c4, s5, c5, s6, c6,
    clip_low, clip_high, floor, ceiling, dual_clip, ratio_clamp, delta, tau_pos, tau_neg, correction_low, correction_high,
    kl_coef, entropy_coef,
    KIND: tl.constexpr, CORRECTION: tl.constexpr, LEVEL: tl.constexpr, KL_KIND: tl.constexpr, REDUCTION: tl.constexpr,
    POINTER: tl.constexpr, PER_ROW: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What depends on a token's sequence: whole rows, dealt out in turn; the second read of a row comes from the cache."""
    length = known_multiple(length, ALIGNED)
    s0, s1, s2 = known_multiple(s0, ALIGNED), known_multiple(s1, ALIGNED), known_multiple(s2, ALIGNED and not PER_ROW)
    s3, s4 = known_multiple(s3, ALIGNED), known_multiple(s4, ALIGNED)
    s5, s6 = known_multiple(s5, ALIGNED), known_multiple(s6, ALIGNED)
    lane = lanes(BLOCK)
    column = _nothing(BLOCK // 4)
    sequences = tl.full([], 0.0, tl.float32)
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(i, tl.int64)
        start, size = row_bounds(row, cu_seqlens, length)
        tensors = (logprobs, old_logprobs, advantages, mask, rollout_logprobs, ref_logprobs, entropy)
        tensor_strides = (s0, c0, s1, c1, s2, c2, s3, c3, s4, c4, s5, c5, s6, c6)
        numbers = (clip_low, clip_high, floor, ceiling, dual_clip, delta, tau_pos, tau_neg)
        bounds = (ratio_clamp, correction_low, correction_high)
        sums = _row_sums(
            (logprobs, old_logprobs, advantages, mask, rollout_logprobs), tensor_strides, row, start, size,
            (correction_low, correction_high), clip_low, clip_high, KIND, CORRECTION, LEVEL, BLOCK,
        )  # fmt: skip
        sequences += (sums[0] != 0).to(tl.float32)
        plan = _close_row(sums, (floor, ceiling, dual_clip, delta), bounds, KIND, CORRECTION, LEVEL, REDUCTION)
        for first in range(0, size, BLOCK):
            tile_sums = _tile_loss(
                tensors, tensor_strides, row, start + first, row * length + start + first, lane, lane < size - first,
                plan, numbers, bounds, (kl_coef, entropy_coef), grad_logprobs, grad_entropy, KIND, CORRECTION, LEVEL, KL_KIND,
            )  # fmt: skip
            column = _together(column, tile_sums)
    _finish(
        column, sequences, partials, denominator, cu_seqlens, rows, length, rollout_logprobs is not None, loss, stats,
        share, counter, REDUCTION, POINTER,
    )  # fmt: skip


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor | None,
    rollout_logprobs: torch.Tensor | None,
    ref_logprobs: torch.Tensor | None,
    entropy: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    denominator: float | torch.Tensor | None,
    *,
    numbers: list[float],
    codes: list[int],
    grad_logprobs: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    loss: torch.Tensor,
    stats: torch.Tensor,
    share: torch.Tensor,
    counter: torch.Tensor,
) -> None:
    """Loss and statistics; gradients of the loss over `share`, which comes last: `scale` multiplies it in."""
    clip_low, clip_high, dual_clip, ratio_clamp, delta, tau_pos, tau_neg, low, high, kl_coef, entropy_coef = map(float, numbers)
    kind, correction, level, kl_kind, reduction = codes
    per_row = advantages.shape != logprobs.shape
    empty = logprobs.numel() == 0
    tokenwise = kind < 4 and reduction < 2 and (correction == 0 or level == 0) and not (per_row and cu_seqlens is not None)
    if empty:  # one program still has zeros to write
        tokenwise, kind, correction, reduction, rows, length = True, 0, 0, 0, 1, 0
    else:
        rows, length = row_shape(logprobs, None if tokenwise else cu_seqlens)
    choice = tile("policy_loss.tokens" if tokenwise else "policy_loss.rows", logprobs, length)
    programs = min(max(rows * triton.cdiv(length, choice["BLOCK"]), 1), PROGRAMS) if tokenwise else min(rows, PROGRAMS)
    launch(
        token_kernel if tokenwise else row_kernel, (programs,),
        logprobs, old_logprobs, advantages, plain(mask), rollout_logprobs, ref_logprobs, entropy,
        None if tokenwise else cu_seqlens, denominator, grad_logprobs, grad_entropy, loss, stats, share, counter,
        torch.empty((SUMS, programs), dtype=torch.float32, device=logprobs.device), rows, length,
        *strides(logprobs), *strides(old_logprobs), *((advantages.stride(0), 0) if per_row else strides(advantages)),
        *strides(mask), *strides(rollout_logprobs), *strides(ref_logprobs), *strides(entropy),
        clip_low, clip_high, 1 - clip_low, 1 + clip_high, dual_clip, ratio_clamp, delta, tau_pos, tau_neg, low, high,
        kl_coef, entropy_coef,
        KIND=kind, CORRECTION=correction, LEVEL=level, KL_KIND=kl_kind, REDUCTION=reduction,
        POINTER=isinstance(denominator, torch.Tensor), PER_ROW=per_row,
        ALIGNED=aligned(length, logprobs, old_logprobs, advantages, mask, rollout_logprobs, ref_logprobs, entropy), **choice,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n"])
def scale_kernel(d, grad, share, out, n, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    n = known_multiple(n, ALIGNED)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(grad) * tl.load(share)
    tl.store(out + i, (tl.load(d + i, mask=i < n, other=0) * factor).to(out.dtype.element_ty), mask=i < n)


def scale(d: torch.Tensor, grad: torch.Tensor, share: torch.Tensor, out: torch.Tensor) -> None:
    """out = d (grad share), in out's dtype."""
    n = d.numel()
    choice = tile("policy_loss.scale", d, n)
    launch(scale_kernel, (triton.cdiv(n, choice["BLOCK"]),), d, grad, share, out, n, ALIGNED=n % 16 == 0, **choice)
