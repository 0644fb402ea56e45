"""What a loss's reduction divides by, and the gradient of a loss whose divisor only the device knows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import checks
from .backend import DTYPES, cuda_extension, raw_stream, triton_kernels
from .distributed import all_reduce_sum
from .library import Op


def given_denominator(denominator: Any, like: Tensor, default: float) -> float | Tensor:
    """The given divisor, checked, or a default where it is None."""
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1:
            raise ValueError(f"denominator: expected one number, got shape {checks.shape_of(denominator)}")
        checks.same_device("denominator", denominator, "the input", like)
        return denominator.detach()
    if denominator is not None:
        checks.number("denominator", denominator, low=0, open_low=True)
        return float(denominator)
    return default


def global_denominator(
    denominator: Any, like: Tensor, mask: Tensor | None, cu: Tensor | None, reduction: str, group: Any
) -> float | Tensor | None:
    """The divisor of a reduction: the given one, or the count over a group; None for the local count."""
    if denominator is not None:
        return given_denominator(denominator, like, math.nan)
    if group is None or reduction == "token-sum":
        return None
    weights = torch.ones_like(like, dtype=torch.float64) if mask is None else mask.double()
    if reduction == "token-mean":
        local = weights.sum()
    else:
        longest: int | Tensor = like.shape[-1]
        if cu is not None:
            lengths = cu.diff()
            row = torch.repeat_interleave(torch.arange(len(lengths), device=like.device), lengths, output_size=like.shape[0])
            local = weights.new_zeros(len(lengths)).index_add(0, row, weights).ne(0).sum().double()
            longest = torch.cat([lengths, lengths.new_zeros(1)]).amax()
        else:
            local = (weights.sum(-1) != 0).sum().double()
        if reduction == "seq-mean-token-sum-norm":
            local = local * longest
    return all_reduce_sum(local, group)


def read_denominator(given: Tensor) -> float:
    """A denominator's value; NaN stands for the local count in the kernels and cannot be given."""
    value = float(given.item())
    if not 0 <= value < math.inf:
        raise ValueError(f"denominator: expected a finite number >= 0, got {value}")
    return value


def divided(total: Tensor, over: float | Tensor) -> Tensor:
    """A sum over its denominator; 0, and no gradient, where that is 0."""
    if isinstance(over, Tensor) and over.is_cpu and not torch.compiler.is_compiling():
        over = read_denominator(over)
    if isinstance(over, Tensor):
        over = over.reshape(()).to(total.dtype)
        return total * torch.where(over != 0, 1 / torch.where(over != 0, over, 1.0), 0.0)
    return total / over if over else total * 0.0


def device_denominator(given: Tensor | None) -> Tensor | None:
    """For a GPU kernel: a tensor stays on the device."""
    return None if given is None else given.reshape(1).to(torch.float64)


def triton_denominator(denominator: float, given: Tensor | None) -> Tensor | float | None:
    """The same or a number; None, of NaN, is the local count."""
    return device_denominator(given) if given is not None or math.isnan(denominator) else denominator


def _scaled_implementation(d: Tensor, grad: Tensor, share: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    out = torch.empty(d.shape, dtype=dtype, device=d.device)
    grad = grad.to(torch.float32)
    if backend == "triton":
        triton_kernels("policy_loss").scale(d, grad, share, out)
    else:
        cuda_extension().scale(
            d.data_ptr(), grad.data_ptr(), share.data_ptr(), d.numel(), DTYPES[dtype], out.data_ptr(), raw_stream(d)
        )
    return out


_scaled = Op(
    "scaled",
    "(Tensor d, Tensor grad, Tensor share, ScalarType dtype, str backend) -> Tensor",
    _scaled_implementation,
    lambda d, grad, share, dtype, backend: d.new_empty(d.shape, dtype=dtype),
)


def loss_gradient(d: Tensor | None, grad: Tensor, share: Tensor | None, dtype: torch.dtype, backend: str) -> Tensor | None:
    """The gradient of a loss from the one its forward left: on a GPU that is still without the divisor, which `share` is
    the inverse of. One launch."""
    if d is None:
        return None
    out: Tensor = (d * grad).to(dtype) if share is None else _scaled(d, grad, share, dtype, backend)
    return out
