"""The collectives of tensor parallelism, with their gradients. Identities where the axis has one process.

Without sequence parallelism every process of the axis holds all rows, and a pair of all-reduces stands around each block:
`copy_to_shards` before it, `sum_of_shards` after it. With it each holds a share of the rows between the blocks:
`gather_rows` before, `scatter_rows` after; together they move as many bytes as the all-reduces, and norms and residuals
are computed and kept once instead of once a process.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .groups import Axis

# torch renamed them; the old names warn at every call
all_gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter_single: Callable[..., Any] = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


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


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return reduce_scatter(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_gather_rows(grads[0], ctx.axis), None


class _WholeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather_rows(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        rows = grads[0].shape[0] // ctx.axis.size
        return grads[0].narrow(0, ctx.axis.rank * rows, rows), None


class _ColumnLinear(torch.autograd.Function):
    """x Wᵀ of rows that are shared (`rows`: first gathered) with the sum of x's gradient over the axis running while the
    weight's is computed. Of shared rows only the share is kept; the gather is done again in the backward, behind the
    product that makes x's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis, rows: bool) -> Tensor:
        ctx.axis, ctx.rows, ctx.bias = axis, rows, bias is not None
        ctx.save_for_backward(x, weight)
        return F.linear(all_gather_rows(x, axis) if rows else x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        g, axis = grads[0].contiguous(), ctx.axis
        learns = ctx.needs_input_grad[1]
        gathering = None
        if ctx.rows and learns:
            whole = x.new_empty(x.shape[0] * axis.size, *x.shape[1:])
            gathering = all_gather_single(whole, x.contiguous(), group=axis.group, async_op=True)
        grad = g @ weight
        if gathering is not None:
            gathering.wait()
            x = whole
        if ctx.rows:
            out = grad.new_empty(grad.shape[0] // axis.size, *grad.shape[1:])
            work = reduce_scatter_single(out, grad, group=axis.group, async_op=True)
        else:
            out, work = grad, dist.all_reduce(grad, group=axis.group, async_op=True)
        flat = g.reshape(-1, g.shape[-1])
        of_weight = flat.t() @ x.reshape(-1, x.shape[-1]) if learns else None
        of_bias = flat.sum(0) if ctx.bias else None
        work.wait()
        return out, of_weight, of_bias, None, None


def copy_to_shards(x: Tensor, axis: Axis) -> Tensor:
    """x itself; its gradient is summed over the axis."""
    return x if axis.size == 1 else _CopyToShards.apply(x, axis)


def sum_of_shards(x: Tensor, axis: Axis) -> Tensor:
    """The sum of x over the axis; its gradient passes through."""
    return x if axis.size == 1 else _SumOfShards.apply(x, axis)


def scatter_rows(x: Tensor, axis: Axis) -> Tensor:
    """This rank's share of the rows of the sum of x over the axis: (n, ...) -> (n / size, ...). Its gradient is gathered."""
    return x if axis.size == 1 else _ScatterRows.apply(x, axis)


def whole_rows(x: Tensor, axis: Axis) -> Tensor:
    """The rows of all ranks in rank order: (n, ...) -> (n · size, ...). What follows must be the same on every rank: of its
    gradient each takes its share, without a sum."""
    return x if axis.size == 1 else _WholeRows.apply(x, axis)


def column_linear(x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis, rows: bool) -> Tensor:
    """x Wᵀ + b with this rank's rows of W: (n, in) -> (n, out / size); with `rows` x is this rank's share, (n / size, in)."""
    return F.linear(x, weight, bias) if axis.size == 1 else _ColumnLinear.apply(x, weight, bias, axis, rows)


def all_gather_rows(x: Tensor, axis: Axis) -> Tensor:
    """The rows of all ranks in rank order. No gradient."""
    out = x.new_empty(x.shape[0] * axis.size, *x.shape[1:])
    all_gather_single(out, x.contiguous(), group=axis.group)
    return out


def reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """This rank's share of the rows of the sum. No gradient."""
    out = x.new_empty(x.shape[0] // axis.size, *x.shape[1:])
    reduce_scatter_single(out, x.contiguous(), group=axis.group)
    return out


def gather_last(x: Tensor, axis: Axis) -> Tensor:
    """The shards' last dimensions side by side, in rank order. No gradient."""
    if axis.size == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(axis.size)]
    dist.all_gather(parts, x.contiguous(), group=axis.group)
    return torch.cat(parts, -1)


def summed(x: Tensor, axis: Axis) -> Tensor:
    """x itself, now its sum over the axis. No gradient."""
    if axis.size > 1:
        dist.all_reduce(x, group=axis.group)
    return x


def led(world: Axis, work: Callable[[], None]) -> None:
    """The first process does its work while the others wait for it, however long it takes: every second they hear that it goes
    on, which no limit of an exchange ends. What it raises is raised in all."""
    if world.size == 1:
        work()
        return
    told: list[Any] = [False, None]
    with ThreadPoolExecutor(1) as pool:
        doing = pool.submit(work) if world.first else None
        while not told[0]:
            if doing is not None:
                wait([doing], 1.0)
                told = [True, doing.exception()] if doing.done() else told
            dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise told[1]
