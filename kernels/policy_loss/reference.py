"""The definition of the policy losses: autograd over the formulas."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..gae.reference import unpack
from ..kl.reference import kl as token_kl
from ..logprobs.reference import compute_dtype

KINDS = ("ppo", "reinforce", "cispo", "sapo", "gspo", "gmpo")
REDUCTIONS = ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
CORRECTIONS = ("none", "tis", "mis", "icepop")
LEVELS = ("token", "sequence", "geometric")
STATS = (
    "clip_fraction_low", "clip_fraction_high", "dual_clip_fraction", "ratio_mean", "ratio_min", "ratio_max",
    "approx_kl_k1", "approx_kl_k3", "ref_kl", "entropy", "tokens",
    "rollout_mismatch_mean", "rollout_mismatch_max", "rollout_weight_mean", "rollout_corrected_fraction",
)  # fmt: skip
MISMATCH_BOUND = 20.0  # of a log importance ratio, as the frameworks clamp it


@dataclass(frozen=True)
class RolloutCorrection:
    """How the mismatch between the rollout engine's policy and the old one is corrected.

    With ρ = exp(old_logprobs - rollout_logprobs), detached, the policy term of the loss is multiplied by

    - ``tis``: min(ρ, high) (truncated importance sampling);
    - ``mis``: ρ where ρ <= high, else 0 (masked importance sampling);
    - ``icepop``: ρ where low <= ρ <= high, else 0.

    level: ``token``; ``sequence``, ρ the product over the sequence's counted tokens; ``geometric``, their geometric mean.
    """

    kind: str = "tis"
    level: str = "token"
    low: float = 0.5
    high: float = 2.0

    def __post_init__(self) -> None:
        if self.kind not in CORRECTIONS[1:]:
            raise ValueError(f"rollout_correction: kind must be one of {CORRECTIONS[1:]}, got {self.kind!r}")
        if self.level not in LEVELS:
            raise ValueError(f"rollout_correction: level must be one of {LEVELS}, got {self.level!r}")
        if not 0 <= self.low <= self.high:
            raise ValueError(f"rollout_correction: needs 0 <= low <= high, got low={self.low}, high={self.high}")

    def weight(self, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of clamped log-ratios, and where they differ from the ratio."""
        ratio = log_ratio.clamp(-MISMATCH_BOUND, MISMATCH_BOUND).exp()
        if self.kind == "tis":
            out = ratio.clamp(max=self.high)
        else:
            kept = ratio <= self.high
            if self.kind == "icepop":
                kept = kept & (ratio >= self.low)
            out = torch.where(kept, ratio, torch.zeros_like(ratio))
        return out, out != ratio


def reduce_loss(loss: Tensor, weights: Tensor, reduction: str, denominator: float | Tensor | None, length: int) -> Tensor:
    """Token losses (B, T) to one number; rows without a counted token are not sequences."""
    tokens = weights.sum(-1)
    sequences = (tokens != 0).sum().to(loss.dtype)
    row = (loss * weights).sum(-1)
    over: float | Tensor
    if reduction == "token-mean":
        over = tokens.sum() if denominator is None else denominator
    elif reduction == "token-sum":
        over = 1.0 if denominator is None else denominator
    elif reduction == "seq-mean-token-mean":
        row = row / torch.where(tokens != 0, tokens, torch.ones_like(tokens))
        over = sequences if denominator is None else denominator
    elif reduction == "seq-mean-token-sum":
        over = sequences if denominator is None else denominator
    else:
        over = sequences * length if denominator is None else denominator
    over = torch.as_tensor(over, dtype=loss.dtype, device=loss.device)
    return torch.where(over != 0, row.sum() / torch.where(over != 0, over, torch.ones_like(over)), row.sum() * 0)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    kind: str = "ppo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio_clamp: float | None = None,
    delta: float | None = None,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    rollout_logprobs: Tensor | None = None,
    rollout_correction: RolloutCorrection | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    reduction: str = "token-mean",
    denominator: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss and its statistics (`STATS`): see `fastrlhf.policy_loss`."""
    dtype = compute_dtype(logprobs, old_logprobs, advantages)
    if cu_seqlens is not None:
        inside = torch.ones_like(logprobs, dtype=torch.bool)
        mask = unpack(inside if mask is None else mask, cu_seqlens)

        def rows(x: Tensor | None) -> Tensor | None:
            return None if x is None else unpack(x, cu_seqlens)

        packed_advantages = advantages.shape == logprobs.shape
        logprobs, old_logprobs = unpack(logprobs, cu_seqlens), unpack(old_logprobs, cu_seqlens)
        advantages = unpack(advantages, cu_seqlens) if packed_advantages else advantages
        rollout_logprobs, ref_logprobs, entropy = rows(rollout_logprobs), rows(ref_logprobs), rows(entropy)
    weights = (torch.ones_like(logprobs) if mask is None else mask).to(dtype)
    counted = weights != 0

    def clean(x: Tensor) -> Tensor:
        """What is not counted may hold anything."""
        return torch.where(counted, x.to(dtype), torch.zeros((), dtype=dtype, device=x.device))

    lp, old = clean(logprobs), clean(old_logprobs)
    A = clean(advantages.unsqueeze(-1).expand_as(lp) if advantages.dim() < lp.dim() else advantages)
    n = weights.sum(-1, keepdim=True)
    safe_n = torch.where(n != 0, n, torch.ones_like(n))
    d = lp - old
    clamped = d if ratio_clamp is None else d.clamp(-ratio_clamp, ratio_clamp)
    ratio = clamped.exp()
    zeros = torch.zeros_like(lp)
    low = high = dual = torch.zeros_like(lp, dtype=torch.bool)

    if kind == "gspo":
        mean = (weights * d).sum(-1, keepdim=True) / safe_n
        ratio = (mean if ratio_clamp is None else mean.clamp(-ratio_clamp, ratio_clamp)).exp().expand_as(lp)
    if kind in ("ppo", "gspo"):
        free = A * (ratio if delta is None else ratio.clamp(max=delta))
        held = A * ratio.clamp(1 - clip_low, 1 + clip_high)
        objective = torch.minimum(free, held)
        low, high = (held < free) & (A < 0), (held < free) & (A > 0)
        if dual_clip is not None:
            dual = (A < 0) & (objective < A * dual_clip)
            objective = torch.where(dual, A * dual_clip, objective)
    elif kind == "reinforce":
        objective = A * lp
    elif kind == "cispo":
        objective = A * ratio.detach().clamp(1 - clip_low, 1 + clip_high) * lp
        low, high = ratio < 1 - clip_low, ratio > 1 + clip_high
    elif kind == "sapo":
        tau = torch.where(A > 0, tau_pos, tau_neg).to(dtype)
        objective = A * torch.sigmoid(tau * (ratio - 1)) * 4 / tau
    else:  # gmpo
        held = torch.where(A > 0, d.clamp(max=clip_high), torch.where(A < 0, d.clamp(min=-clip_low), zeros))
        ratio = ((weights * held).sum(-1, keepdim=True) / safe_n).exp().expand_as(lp)
        objective = (weights * A).sum(-1, keepdim=True) / safe_n * ratio
        low, high = (A < 0) & (d < -clip_low), (A > 0) & (d > clip_high)

    weight, corrected, mismatch = torch.ones_like(lp), torch.zeros_like(counted), zeros
    if rollout_logprobs is not None:
        mismatch = (old - clean(rollout_logprobs)).detach()
        if rollout_correction is not None:
            log_weight = mismatch
            if rollout_correction.level != "token":
                log_weight = (weights * mismatch).sum(-1, keepdim=True).expand_as(lp)
                if rollout_correction.level == "geometric":
                    log_weight = log_weight / safe_n
            weight, corrected = rollout_correction.weight(log_weight)
    loss = -weight * objective
    ref_kl, H = zeros, zeros
    if ref_logprobs is not None:
        ref_kl = token_kl(lp, clean(ref_logprobs), kind=kl)
        loss = loss + kl_coef * ref_kl
    if entropy is not None:
        H = clean(entropy)
        loss = loss - entropy_coef * H
    out = reduce_loss(loss, weights, reduction, denominator, lp.shape[-1])

    with torch.no_grad():
        tokens = weights.sum()
        some = tokens != 0

        def mean_of(x: Tensor) -> Tensor:
            return torch.where(some, (weights * x).sum() / torch.where(some, tokens, torch.ones_like(tokens)), tokens * 0)

        inf = torch.full_like(ratio, torch.inf)
        least = torch.where(counted, ratio, inf).amin() if ratio.numel() else tokens
        most = torch.where(counted, ratio, -inf).amax() if ratio.numel() else tokens
        zero = torch.zeros_like(tokens)
        stats = torch.stack([
            mean_of(low), mean_of(high), mean_of(dual), mean_of(ratio), torch.where(some, least, zero),
            torch.where(some, most, zero), mean_of(-clamped), mean_of(torch.expm1(clamped) - clamped), mean_of(ref_kl),
            mean_of(H), tokens, mean_of(mismatch.abs()), mismatch.abs().amax() if mismatch.numel() else zero,
            mean_of(weight), mean_of(corrected),
        ])  # fmt: skip
    return out, stats.float()
