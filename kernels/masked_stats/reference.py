"""The definitions of the masked statistics: masks are weights, and an element of weight 0 may hold anything."""

from __future__ import annotations

import torch
from torch import Tensor

from ..logprobs.reference import compute_dtype


def weighted(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """x with 0 where the mask is, and the mask as weights."""
    x = x.to(compute_dtype(x))
    if mask is None:
        return x, torch.ones_like(x)
    weights = mask.to(x.dtype)
    return torch.where(weights != 0, x, torch.zeros_like(x)), weights


def masked_mean(x: Tensor, mask: Tensor | None, dim: int | None = None) -> Tensor:
    """Σ m x / Σ m, 0 where nothing counts."""
    x, w = weighted(x, mask)
    total, count = ((x * w).sum(), w.sum()) if dim is None else ((x * w).sum(dim), w.sum(dim))
    return torch.where(count != 0, total / torch.where(count != 0, count, torch.ones_like(count)), torch.zeros_like(total))


def masked_var(x: Tensor, mask: Tensor | None, *, unbiased: bool = True) -> Tensor:
    """Σ m (x - mean)² / (Σ m - 1), or / Σ m; 0 where that is not defined."""
    x, w = weighted(x, mask)
    count = w.sum()
    over = count - 1 if unbiased else count
    square = (w * (x - masked_mean(x, w)) ** 2).sum()
    return torch.where(over > 0, square / torch.where(over > 0, over, torch.ones_like(over)), torch.zeros_like(square))


def whiten(x: Tensor, mask: Tensor | None, *, shift_mean: bool = True, unbiased: bool = True, eps: float = 1e-8) -> Tensor:
    """(x - mean) / √(var + eps), + mean unless shift_mean; zeros where the mask is 0."""
    x, w = weighted(x, mask)
    mean = masked_mean(x, w)
    spread = masked_var(x, w, unbiased=unbiased) + eps
    some = spread > 0
    out = (x - mean) * torch.where(some, torch.rsqrt(torch.where(some, spread, torch.ones_like(spread))), spread * 0)
    return torch.where(w != 0, out if shift_mean else out + mean, torch.zeros_like(out))
