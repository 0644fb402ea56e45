"""The definition of the value loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gae.reference import unpack
from ..logprobs.reference import compute_dtype
from ..masked_stats.reference import masked_mean, masked_var
from ..policy_loss.reference import reduce_loss

STATS = ("clip_fraction", "explained_variance", "value_mean", "return_mean", "tokens")


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor | None,
    *,
    clip: float | None = 0.2,
    reduction: str = "token-mean",
    denominator: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """0.5 max((V - R)², (V_old + clamp(V - V_old, ±clip) - R)²), and its statistics (`STATS`)."""
    dtype = compute_dtype(values, returns)
    old_values = values.detach() if old_values is None else old_values
    if cu_seqlens is not None:
        mask = unpack(torch.ones_like(values, dtype=torch.bool) if mask is None else mask, cu_seqlens)
        values, old_values, returns = (unpack(x, cu_seqlens) for x in (values, old_values, returns))
    weights = (torch.ones_like(values) if mask is None else mask).to(dtype)
    counted = weights != 0
    zero = torch.zeros((), dtype=dtype, device=values.device)
    v, old, r = (torch.where(counted, x.to(dtype), zero) for x in (values, old_values, returns))
    plain = (v - r) ** 2
    held = plain
    if clip is not None:  # inside the clamp they are one number, but for rounding
        held = torch.where((v - old).abs() > clip, (old + (v - old).clamp(-clip, clip) - r) ** 2, plain)
    out = reduce_loss(0.5 * torch.maximum(plain, held), weights, reduction, denominator, v.shape[-1])
    with torch.no_grad():
        spread = masked_var(r, weights, unbiased=False)
        explained = torch.where(spread > 0, 1 - masked_var(r - v, weights, unbiased=False) / spread, spread * 0)
        stats = torch.stack([
            masked_mean((held > plain).to(dtype), weights), explained, masked_mean(v, weights), masked_mean(r, weights),
            weights.sum(),
        ])  # fmt: skip
    return out, stats.float()
