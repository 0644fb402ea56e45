"""Losses of pairs, their mean, derivatives and statistics: one program, in double, a batch being thousands at the most."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.launch import launch
from ..common.tiles import tile
from ..common.triton_tokens import plain

_STRIDES = [
    f"s_{x}" for x in ("chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_rewards", "rejected_rewards", "lengths")
]


@triton.jit
def _expm1(x):
    """Kahan's way: the rounding of e^x cancels between numerator and denominator."""
    u = tl.exp(x)
    usual = (u - 1) * x / tl.log(tl.where((u == 1) | (u == 0), 2.0, u))
    return tl.where(u == 1, x, tl.where(u == 0, -1.0, usual))


@triton.jit
def _log1p(x):
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * x / tl.where(u == 1, 1.0, u - 1))


@triton.jit
def _sigmoid(x):
    """sigmoid(x), sigmoid(-x) and their logarithms from one exponential."""
    e = tl.exp(-tl.abs(x))
    log = _log1p(e)
    large, small, negative = 1 / (1 + e), e / (1 + e), x < 0
    return (
        tl.where(negative, small, large), tl.where(negative, large, small),
        tl.where(negative, x - log, -log), tl.where(negative, -log, -x - log),
    )  # fmt: skip


@triton.jit
def _log_odds(x):
    """log(p / (1 - p)) of p = e^x, x < 0, and its slope."""
    e = _expm1(x)
    return x - tl.log(-e), -1 / e


@triton.jit
def _pair_loss(
    chosen, rejected, g, beta, smoothing, margin, baseline, desirable_weight, undesirable_weight, KIND: tl.constexpr
):  # fmt: skip
    """(loss, its derivatives by chosen and by rejected)."""
    x = beta * (chosen - rejected)
    if KIND == 0 or KIND == 7:  # dpo, simpo
        of, of_minus, log, log_minus = _sigmoid(x - margin if KIND == 7 else x)
        value = -(1 - smoothing) * log - smoothing * log_minus
        slope = beta * (smoothing * of - (1 - smoothing) * of_minus)
    elif KIND == 1:  # robust
        of, of_minus, log, log_minus = _sigmoid(x)
        value = (-(1 - smoothing) * log + smoothing * log_minus) / (1 - 2 * smoothing)
        slope = -beta * ((1 - smoothing) * of_minus + smoothing * of) / (1 - 2 * smoothing)
    elif KIND == 2:  # ipo
        d = chosen - rejected - 1 / (2 * beta)
        value, slope = d * d, 2 * d
    elif KIND == 3:  # hinge
        value, slope = tl.where(x < 1, 1 - x, 0.0), tl.where(x < 1, -beta, 0.0)
    elif KIND == 4:  # rpo_sq
        value, slope = (x - g) * (x - g), 2 * beta * (x - g)
    elif KIND == 5 or KIND == 6:  # rpo_fwd_kl, rpo_bwd_kl: between Bernoulli distributions
        of_x, of_minus_x, log_x, log_minus_x = _sigmoid(x)
        of_g, of_minus_g, log_g, log_minus_g = _sigmoid(g)
        if KIND == 5:
            value = of_x * (log_x - log_g) + of_minus_x * (log_minus_x - log_minus_g)
            slope = beta * of_x * of_minus_x * (x - g)
        else:
            value = of_g * (log_g - log_x) + of_minus_g * (log_minus_g - log_minus_x)
            slope = beta * (of_x - of_g)
    elif KIND == 8:  # orpo
        odds, odds_slope = _log_odds(chosen)
        worse_odds, worse_odds_slope = _log_odds(rejected)
        _, of_minus, log, _ = _sigmoid(odds - worse_odds)
        moves = beta * of_minus != 0  # else a certain answer: infinite odds
        value = tl.where(moves, -beta * log, 0.0)
        slope = tl.where(moves, -beta * of_minus * odds_slope, 0.0)
        rejected_slope = tl.where(moves, beta * of_minus * worse_odds_slope, 0.0)
    elif KIND == 10 or KIND == 11:  # bt, margin_bt
        _, of_minus, log, _ = _sigmoid(chosen - rejected - g if KIND == 11 else chosen - rejected)
        value, slope = -log, -of_minus
    elif KIND == 12:  # scaled_bt
        _, of_minus, log, _ = _sigmoid(chosen - rejected)
        value, slope = -g * log, -g * of_minus
    else:  # kto: both halves of the pair on their own
        s, s_minus, _, _ = _sigmoid(beta * (chosen - baseline))
        t, t_minus, _, _ = _sigmoid(beta * (baseline - rejected))
        value = 0.5 * (desirable_weight * s_minus + undesirable_weight * t_minus)
        slope = -0.5 * desirable_weight * beta * s * s_minus
        rejected_slope = 0.5 * undesirable_weight * beta * t * t_minus
    if KIND != 8 and KIND != 9:
        rejected_slope = -slope
    return value, slope, rejected_slope


@triton.jit
def _pairs(x, i, stride, inside):
    """Values of some pairs in double; zeros where there is no tensor."""
    if x is None:
        return tl.zeros(i.shape, tl.float64)
    else:
        return tl.load(x + i.to(tl.int64) * stride, mask=inside, other=0).to(tl.float64)


@triton.jit
def _store(out, i, x, inside):
    if out is not None:
        tl.store(out + i, x.to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["pairs"], do_not_specialize_on_alignment=_STRIDES)
def preference_kernel(
    chosen, rejected, ref_chosen, ref_rejected, chosen_rewards, rejected_rewards, chosen_lengths, baseline, denominator,
    loss, losses, d_chosen, d_rejected, mean_d_chosen, mean_d_rejected, stats, pairs,
    s_chosen, s_rejected, s_ref_chosen, s_ref_rejected, s_chosen_rewards, s_rejected_rewards, s_lengths,
    beta, smoothing, reward_scale, margin, kl_baseline, desirable_weight, undesirable_weight, sft_coef,
    KIND: tl.constexpr, SFT: tl.constexpr, BASELINE: tl.constexpr, POINTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    beta, smoothing, margin = tl.cast(beta, tl.float64), tl.cast(smoothing, tl.float64), tl.cast(margin, tl.float64)
    zero = tl.full([], 0.0, tl.float64)
    centre = tl.load(baseline).to(tl.float64) if BASELINE else zero + kl_baseline
    count = tl.maximum(pairs, 1).to(tl.float64)
    if denominator is None:
        over = count
    elif POINTER:
        over = tl.load(denominator).to(tl.float64)
    else:
        over = zero + denominator
    share = tl.where(over != 0, 1 / tl.where(over != 0, over, 1.0), 0.0)
    total, sft, accuracy = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    chosen_total, rejected_total = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for first in range(0, pairs, BLOCK):
        i = first + tl.arange(0, BLOCK)
        inside = i < pairs
        given = _pairs(chosen, i, s_chosen, inside)
        c = given - _pairs(ref_chosen, i, s_ref_chosen, inside)
        r = _pairs(rejected, i, s_rejected, inside) - _pairs(ref_rejected, i, s_ref_rejected, inside)
        g = _pairs(chosen_rewards, i, s_chosen_rewards, inside)
        if KIND < 10:
            g = reward_scale * (g - _pairs(rejected_rewards, i, s_rejected_rewards, inside))
        value, dc, dr = _pair_loss(c, r, g, beta, smoothing, margin, centre, desirable_weight, undesirable_weight, KIND)
        _store(losses, i, value, inside)
        _store(d_chosen, i, dc, inside)
        _store(d_rejected, i, dr, inside)
        if SFT:
            length = zero + 1.0
            if chosen_lengths is not None:
                length = tl.where(inside, _pairs(chosen_lengths, i, s_lengths, inside), 1.0)
            sft -= tl.where(inside, given / length, 0.0)
            dc -= sft_coef / length
        _store(mean_d_chosen, i, dc * share, inside)
        _store(mean_d_rejected, i, dr * share, inside)
        total += tl.where(inside, value, 0.0)
        accuracy += tl.where(inside & (c > r), 1.0, 0.0)
        chosen_total += tl.where(inside, c, 0.0)
        rejected_total += tl.where(inside, r, 0.0)
    mean_chosen, mean_rejected = tl.sum(chosen_total, 0) / count, tl.sum(rejected_total, 0) / count
    if KIND < 10:
        mean_chosen, mean_rejected = beta * mean_chosen, beta * mean_rejected
    sft_loss = tl.sum(sft, 0) * share
    out = tl.sum(total, 0) * share
    if SFT:
        out += sft_coef * sft_loss
    tl.store(loss, out.to(tl.float32))
    tl.store(stats, (tl.sum(accuracy, 0) / count).to(tl.float32))
    tl.store(stats + 1, (mean_chosen - mean_rejected).to(tl.float32))
    tl.store(stats + 2, mean_chosen.to(tl.float32))
    tl.store(stats + 3, mean_rejected.to(tl.float32))
    if KIND < 10:
        tl.store(stats + 4, sft_loss.to(tl.float32))


def _stride(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def preference_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor | None,
    ref_rejected: torch.Tensor | None,
    chosen_rewards: torch.Tensor | None,
    rejected_rewards: torch.Tensor | None,
    chosen_lengths: torch.Tensor | None,
    baseline: torch.Tensor | None,
    denominator: float | torch.Tensor | None,
    *,
    kind: int,
    numbers: list[float],
    loss: torch.Tensor,
    losses: torch.Tensor,
    d_chosen: torch.Tensor | None,
    d_rejected: torch.Tensor | None,
    mean_d_chosen: torch.Tensor | None,
    mean_d_rejected: torch.Tensor | None,
    stats: torch.Tensor,
) -> None:
    """The loss of each pair and their mean, with derivatives of both where they are wanted."""
    pairs = chosen.shape[0]
    inputs = (chosen, rejected, ref_chosen, ref_rejected, chosen_rewards, rejected_rewards, plain(chosen_lengths))
    launch(
        preference_kernel, (1,), *inputs, baseline, denominator,
        loss, losses, d_chosen, d_rejected, mean_d_chosen, mean_d_rejected, stats, pairs, *(_stride(t) for t in inputs),
        *map(float, numbers), KIND=kind, SFT=numbers[7] != 0, BASELINE=baseline is not None,
        POINTER=isinstance(denominator, torch.Tensor), **tile("preference_loss", chosen, pairs),
    )  # fmt: skip


@triton.jit
def _error(predictions, targets, i, s_predictions, s_targets, ignore_value, inside):
    """prediction - target in double and whether the target is given; 0 where it is not."""
    target = _pairs(targets, i, s_targets, inside)
    counted = inside & (target != ignore_value)
    return tl.where(counted, _pairs(predictions, i, s_predictions, inside) - target, 0.0), counted


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["s_predictions", "s_targets"])
def regression_kernel(
    predictions, targets, loss, grad, stats, n, s_predictions, s_targets, ignore_value, BLOCK: tl.constexpr
):  # fmt: skip
    square, absolute = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.float64)
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        e, counted = _error(predictions, targets, i, s_predictions, s_targets, ignore_value, i < n)
        square, absolute, count = square + e * e, absolute + tl.abs(e), count + tl.where(counted, 1.0, 0.0)
    total = tl.sum(count, 0)
    share = tl.where(total > 0, 1 / tl.where(total > 0, total, 1.0), 0.0)
    if grad is not None:
        for first in range(0, n, BLOCK):
            i = first + tl.arange(0, BLOCK)
            e, counted = _error(predictions, targets, i, s_predictions, s_targets, ignore_value, i < n)
            _store(grad, i, 2 * e * share, i < n)
    mean_square = (tl.sum(square, 0) * share).to(tl.float32)
    tl.store(loss, mean_square)
    tl.store(stats, mean_square)
    tl.store(stats + 1, (tl.sum(absolute, 0) * share).to(tl.float32))
    tl.store(stats + 2, total.to(tl.float32))


def regression_loss(
    predictions: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_value: float,
    loss: torch.Tensor,
    grad: torch.Tensor | None,
    stats: torch.Tensor,
) -> None:
    """Mean squared error over the targets that are given; inputs contiguous, or strided in their one dimension."""
    n = predictions.numel()
    s_predictions, s_targets = (t.stride(0) if t.dim() == 1 else 1 for t in (predictions, targets))
    launch(
        regression_kernel, (1,), predictions, targets, loss, grad, stats, n, s_predictions, s_targets, float(ignore_value),
        **tile("preference_loss.regression", predictions, n),
    )  # fmt: skip
