"""The definition of `linear_logprobs`: `logprobs` of hidden · weightᵀ + bias, in float32 or, for float64 inputs, float64."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..logprobs import reference
from ..logprobs.reference import compute_dtype


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., H), (V, H), (V): (..., V), not rounded below the dtype that is computed in."""
    dtype = compute_dtype(hidden, weight)
    out = hidden.to(dtype) @ weight.to(dtype).T
    return out if bias is None else out + bias.to(dtype)


def linear_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """log-probs (labels' shape), entropy and lse (the leading shape); options as `kernels.logprobs.reference.logprobs`."""
    return reference.logprobs(logits(hidden, weight, bias), labels, **options)
