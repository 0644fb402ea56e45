"""The definitions of reward shaping, generalised advantage estimation and discounted returns: loops over tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kl.reference import kl as token_kl
from ..logprobs.reference import compute_dtype

MASK_MODES = ("carry", "zero", "none")


def unpack(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(total) to (B, longest), zeros (False) behind each segment."""
    cu = cu_seqlens.tolist()
    longest = max((b - a for a, b in zip(cu, cu[1:], strict=False)), default=0)
    out = x.new_zeros(len(cu) - 1, longest)
    for i, (a, b) in enumerate(zip(cu, cu[1:], strict=False)):
        out[i, : b - a] = x[a:b]
    return out


def pack(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(B, longest) back to (total)."""
    cu = cu_seqlens.tolist()
    parts = [x[i, : b - a] for i, (a, b) in enumerate(zip(cu, cu[1:], strict=False))]
    return torch.cat(parts) if parts else x.new_zeros(0)


def shape_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None,
    *,
    kl_coef: float,
    kl: str = "k1",
    score_clip: float | None = None,
    kl_clip: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """rewards_t = -kl_coef kl_t m_t, + the sequence's clipped score at its last counted token; and kl_t m_t."""
    if cu_seqlens is not None:
        mask = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask != 0
        rewards, kls = shape_rewards(
            scores, unpack(logprobs, cu_seqlens), unpack(ref_logprobs, cu_seqlens), unpack(mask, cu_seqlens),
            kl_coef=kl_coef, kl=kl, score_clip=score_clip, kl_clip=kl_clip,
        )  # fmt: skip
        return pack(rewards, cu_seqlens), pack(kls, cu_seqlens)
    counted = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask != 0
    kls = token_kl(logprobs, ref_logprobs, kind=kl, clamp_output=kl_clip)
    kls = torch.where(counted, kls, torch.zeros_like(kls))
    rewards = -kl_coef * kls
    scores = scores.to(rewards.dtype)
    if score_clip is not None:
        scores = scores.clamp(-score_clip, score_clip)
    for b in range(rewards.shape[0]):
        where = counted[b].nonzero()
        if len(where):
            rewards[b, where[-1, 0]] += scores[b]
    return rewards, kls


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    mask_mode: str = "carry",
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """δ_t = r_t + γ V_{t+1} - V_t, A_t = δ_t + γ λ A_{t+1}, returns A + V (Schulman et al. 2016)."""
    if cu_seqlens is not None:
        # behind a segment nothing counts, and carrying over it changes nothing
        inside = unpack(torch.ones_like(rewards, dtype=torch.bool), cu_seqlens)
        counted = inside if mask is None or mask_mode == "none" else unpack(mask != 0, cu_seqlens)
        r, v = unpack(rewards, cu_seqlens), unpack(values, cu_seqlens)
        if mask_mode == "zero" and mask is not None:
            weights = unpack(mask, cu_seqlens).to(compute_dtype(r, v))
            r, v = (torch.where(weights != 0, x * weights, torch.zeros_like(weights)) for x in (r, v))
            counted = inside
        a, returns = gae(r, v, counted, gamma=gamma, lam=lam, bootstrap=bootstrap)
        return pack(a, cu_seqlens), pack(returns, cu_seqlens)
    dtype = compute_dtype(rewards, values)
    rewards, values = rewards.to(dtype), values.to(dtype)
    counted = torch.ones_like(rewards, dtype=torch.bool) if mask is None or mask_mode == "none" else mask != 0
    if mask_mode == "zero" and mask is not None:
        zero = torch.zeros_like(rewards)
        assert mask is not None
        rewards, values = (torch.where(counted, x * mask.to(dtype), zero) for x in (rewards, values))
        counted = torch.ones_like(counted)
    next_value = rewards.new_zeros(rewards.shape[0]) if bootstrap is None else bootstrap.to(dtype)
    advantage = torch.zeros_like(next_value)
    out = torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(counted[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(counted[:, t], values[:, t], next_value)
        out[:, t] = advantage
    return out, out + values


def discounted_returns(
    rewards: Tensor, mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None, gamma: float = 1.0
) -> Tensor:
    """G_t = r_t + γ G_{t+1}, carried unchanged over tokens that do not count: GAE with λ = 1 and no values."""
    return gae(rewards, torch.zeros_like(rewards), mask, cu_seqlens=cu_seqlens, gamma=gamma, lam=1.0)[0]
