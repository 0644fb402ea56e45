"""The definition of `linear_logprobs`: `logprobs` of hidden · weightᵀ + bias, in float32 or, for float64 inputs, float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..logprobs import reference
from ..logprobs.reference import compute_dtype


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, ignored: Tensor | None = None) -> Tensor:
    """(..., H), (V, H), (V): (..., V), not rounded below the dtype that is computed in, autocast or not; `ignored` (...): rows
    whose hidden states are not looked at."""
    dtype = compute_dtype(hidden, weight)
    if ignored is not None:
        hidden = hidden.masked_fill(ignored.unsqueeze(-1), 0)
    with torch.autocast(hidden.device.type, enabled=False):
        out = hidden.to(dtype) @ weight.to(dtype).T
    return out if bias is None else out + bias.to(dtype)


def ignored_rows(hidden: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """(...): those that have only ignore_index."""
    ignored = labels == ignore_index
    return ignored.all(-1) if labels.dim() == hidden.dim() else ignored


def linear_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, ignore_index: int = -100, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """log-probs (labels' shape), entropy and lse (the leading shape); options as `kernels.logprobs.reference.logprobs`."""
    x = logits(hidden, weight, bias, ignored_rows(hidden, labels, ignore_index))
    return reference.logprobs(x, labels, ignore_index=ignore_index, **options)
