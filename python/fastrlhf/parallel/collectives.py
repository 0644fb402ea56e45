"""The two collectives of tensor parallelism, with their gradients. Identities where the axis has one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .groups import Axis


class _CopyToShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad, group=ctx.axis.group)
        return grad, None


class _SumOfShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total, group=axis.group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def copy_to_shards(x: Tensor, axis: Axis) -> Tensor:
    """x itself; its gradient is summed over the axis."""
    return x if axis.size == 1 else _CopyToShards.apply(x, axis)


def sum_of_shards(x: Tensor, axis: Axis) -> Tensor:
    """The sum of x over the axis; its gradient passes through."""
    return x if axis.size == 1 else _SumOfShards.apply(x, axis)


def gather_last(x: Tensor, axis: Axis) -> Tensor:
    """The shards' last dimensions side by side, in rank order. No gradient."""
    if axis.size == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(axis.size)]
    dist.all_gather(parts, x.contiguous(), group=axis.group)
    return torch.cat(parts, -1)
