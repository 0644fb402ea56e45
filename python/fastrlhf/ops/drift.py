"""How far the sampler's log-probs are from the trainer's: a monitor that any loop can call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.policy_loss.reference import MISMATCH_BOUND
from . import checks
from .stats import LossStats

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
NAMES = ("mean", "signed_mean", *QUANTILES, "max", "k3", "ratio_mean", "outside_fraction", "not_finite_fraction", "tokens")
LOW, HIGH = 0.9, 1.1


class LogprobDrift(NamedTuple):
    """`stats` a `LossStats`; `by_position` (bins), the mean |Δ| in each part of the sequences, float32 on the device."""

    stats: LossStats
    by_position: Tensor


def logprob_drift(
    rollout_logprobs: Tensor,
    logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    bins: int = 4,
) -> LogprobDrift:
    """Log-probs of the inference engine against the trainer's for the same tokens, Δ = logprobs - rollout_logprobs.

    A sampler and a trainer with the same weights should give ratios e^Δ near 1. Quantization, other kernels, a missed weight
    update, a temperature or a top-p that only one of them applies do not; the share outside [0.9, 1.1] says how often.
    Nothing waits for the device until `stats` is read. No gradient.

    Args:
        rollout_logprobs, logprobs: (B, T), packed (total) with `cu_seqlens`, or (T) as one sequence; floating.
        mask: the same shape, != 0 counts; None counts all. What is masked may hold anything.
        cu_seqlens: (B + 1), int32 or int64, of a pack.
        bins: parts of equal length that a sequence is cut into, up to its last counted token, >= 1.

    Returns:
        `LogprobDrift(stats, by_position)`. stats, over counted tokens, in nats: mean of |Δ|, signed_mean of Δ, p50, p90, p99
        and max of |Δ|, k3 the mean of e^Δ - 1 - Δ (an estimate of KL(rollout || policy)) and ratio_mean of e^Δ, both with Δ
        clamped to ±20, outside_fraction with e^Δ outside [0.9, 1.1], position_0 to position_{bins-1} the mean |Δ| of each
        part, tokens their number. A Δ that is not finite counts as outside, and in not_finite_fraction; the other statistics
        leave it out. 0 where nothing counts.

    Raises:
        TypeError, ValueError: dtype, shape or device that do not fit, bins < 1.
    """
    cu = checks.token_matrix("rollout_logprobs", rollout_logprobs, cu_seqlens)
    checks.like("logprobs", logprobs, "rollout_logprobs", rollout_logprobs)
    if mask is not None:
        checks.like("mask", mask, "rollout_logprobs", rollout_logprobs, checks.MASKS)
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ValueError(f"bins: expected a number >= 1, got {bins!r}")
    with torch.no_grad():
        d = logprobs.double() - rollout_logprobs.double()
        counted = torch.ones_like(d, dtype=torch.bool) if mask is None else mask != 0
        good = counted & d.isfinite()
        part = _parts(counted, cu, bins)
        n, total = good.sum(), counted.sum()
        d = torch.where(good, d, 0.0)
        size, bounded = d.abs(), d.clamp(-MISMATCH_BOUND, MISMATCH_BOUND)
        ratio = bounded.exp()
        outside = (good & ((ratio < LOW) | (ratio > HIGH))).sum() + (total - n)

        def mean(x: Tensor, where: Tensor = good) -> Tensor:
            return torch.where(where, x, 0.0).sum() / where.sum().clamp(min=1)

        ordered = torch.where(good, size, -1.0).flatten().sort().values if d.numel() else d.new_zeros(1)
        first = ordered.numel() - n  # those that do not count come first
        at = [first + ((n - 1).clamp(min=0) * q).round().long() for q in (*QUANTILES.values(), 1.0)]
        quantiles = [ordered[i.clamp(max=ordered.numel() - 1)].clamp(min=0.0) for i in at]
        by_position = torch.stack([mean(size, good & (part == i)) for i in range(bins)])
        values = [
            mean(size), mean(d), *quantiles, mean(ratio - 1 - bounded), mean(ratio), outside / total.clamp(min=1),
            (total - n) / total.clamp(min=1), total.double(), *by_position,
        ]  # fmt: skip
        names = (*NAMES, *(f"position_{i}" for i in range(bins)))
        return LogprobDrift(LossStats(torch.stack(values).float(), names), by_position.float())


def _parts(counted: Tensor, cu: Tensor | None, bins: int) -> Tensor:
    """Which part of its sequence each token is in; the parts end with the last counted token."""
    at = torch.arange(counted.shape[-1], device=counted.device)
    if cu is None:
        length = (counted * (at + 1)).amax(-1, keepdim=True) if counted.shape[-1] else at
        return (at * bins).expand_as(counted) // length.clamp(min=1)
    row = torch.bucketize(at, cu[1:].to(at.dtype), right=True).clamp(max=max(cu.shape[0] - 2, 0))
    at = at - cu[row]
    length = at.new_zeros(cu.shape[0]).scatter_reduce(0, row, counted * (at + 1), "amax")[row]
    return at * bins // length.clamp(min=1)
