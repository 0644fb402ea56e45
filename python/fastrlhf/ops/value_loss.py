"""The clipped value loss: loss, gradient and statistics in one pass."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.policy_loss.reference import REDUCTIONS
from ..kernels.value_loss import reference
from . import checks, value_checks
from .backend import (
    address,
    choose,
    counter,
    cuda_extension,
    empty_as,
    empty_scalar,
    empty_stats,
    extension,
    raw_stream,
    result_dtype_on,
    row_shape,
    threads,
    tokens,
    triton_kernels,
    workspace,
)
from .library import Op, present
from .reduction import device_denominator, global_denominator, loss_gradient, read_denominator, triton_denominator
from .stats import LossStats


class ValueLoss(NamedTuple):
    """`loss` 0-dim, differentiable; `stats` a `LossStats`."""

    loss: Tensor
    stats: LossStats


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
    group: Any = None,
    backend: str | None = None,
) -> ValueLoss:
    """PPO's value loss: 0.5 max((V - R)², (V_old + clamp(V - V_old, ±clip) - R)²); clip=None is 0.5 (V - R)².

    Args:
        values: (B, T), packed (total) with `cu_seqlens`, or (T) as one sequence; floating. The gradient flows to it only.
        old_values: the same shape; None only with clip=None.
        returns: the same shape.
        mask: the same shape, bool or weights; None counts all. What is masked may hold anything.
        clip: > 0, or None.
        reduction, denominator, cu_seqlens, group, backend: as for `policy_loss`.

    Returns:
        `ValueLoss(loss, stats)`: loss 0-dim float32 (float64 for float64 values), 0 with gradient 0 where nothing is
        counted. stats: clip_fraction (the clipped error is the larger), explained_variance 1 - Var(R - V)/Var(R) (0 where
        R does not vary), value_mean, return_mean, tokens.

    Raises:
        TypeError, ValueError: as for `policy_loss`.

    Source: Schulman et al. 2017 and the reference implementation that clips values.
    """
    cu = checks.token_matrix("values", values, cu_seqlens)
    checks.like("returns", returns, "values", values)
    if old_values is None and clip is not None:
        raise ValueError(f"old_values: needed for clip={clip}, got None")
    if old_values is not None:
        checks.like("old_values", old_values, "values", values)
    if mask is not None:
        checks.like("mask", mask, "values", values, checks.MASKS)
    checks.positive_or_none("clip", clip)
    code = checks.one_of("reduction", reduction, REDUCTIONS)
    denominator = global_denominator(denominator, values, mask, cu, reduction, group)
    backend = choose("value_loss", values, backend)
    if backend == "reference":
        value_checks.pack(cu, values)

        def row(t: Tensor | None) -> Any:
            return t.unsqueeze(0) if t is not None and t.dim() == 1 and cu is None else t

        old, target = None if old_values is None else old_values.detach(), returns.detach()
        loss, stats = reference.value_loss(
            row(values), row(old), row(target), row(mask), clip=clip, reduction=reduction, denominator=denominator,
            cu_seqlens=cu,
        )  # fmt: skip
        return ValueLoss(loss, LossStats(stats, reference.STATS))
    given = denominator if isinstance(denominator, Tensor) else None
    number = math.nan if denominator is None or given is not None else float(denominator)
    loss, stats, *_ = _value_loss(
        values, old_values, returns, mask, cu, given, clip or math.inf, code, number,
        torch.is_grad_enabled() and values.requires_grad, backend,
    )  # fmt: skip
    return ValueLoss(loss, LossStats(stats.detach() if stats.requires_grad else stats, reference.STATS))


def _forward(
    values: Tensor, old_values: Tensor | None, returns: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None,
    given: Tensor | None, clip: float, reduction: int, denominator: float, grad: bool, backend: str,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    dtype = result_dtype_on("value_loss", backend, values, returns)
    loss, stats = empty_scalar(dtype, values), empty_stats(reference.STATS, values)
    d_values = empty_as(values, dtype) if grad else None
    if backend != "cpu" and value_checks.wanted(backend):
        value_checks.pack(cu_seqlens, values)
    if backend == "triton":
        share = empty_scalar(torch.float32, values)
        triton_kernels("value_loss").value_loss(
            values, old_values, returns, mask, cu_seqlens, triton_denominator(denominator, given), clip=clip,
            reduction=reduction, grad_values=d_values, loss=loss, stats=stats, share=share, counter=counter(values),
        )  # fmt: skip
        return loss, stats, d_values, share
    shape, arrays = row_shape(values, cu_seqlens), (tokens(values), tokens(old_values), tokens(returns), tokens(mask))
    if backend == "cpu":
        extension().value_loss(
            shape, dtype == torch.float64, *arrays, clip, reduction,
            denominator if given is None else read_denominator(given), address(d_values), loss.data_ptr(), stats.data_ptr(),
            threads(),
        )  # fmt: skip
        return loss, stats, d_values, None
    share, over = empty_scalar(torch.float32, values), device_denominator(given)
    work, ticket = workspace(shape, values), counter(values)
    cuda_extension().value_loss(
        shape, *arrays, clip, reduction, denominator, address(d_values), loss.data_ptr(), stats.data_ptr(), share.data_ptr(),
        address(over), work.data_ptr(), work.numel(), ticket.data_ptr(), raw_stream(values),
    )  # fmt: skip
    return loss, stats, d_values, share


def _fake(values: Tensor, old: Any, returns: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    dtype = torch.float64 if torch.float64 in (values.dtype, returns.dtype) else torch.float32
    grad = values.new_empty(values.shape, dtype=dtype) if rest[-2] else None
    share = None if rest[-1] == "cpu" else values.new_empty((), dtype=torch.float32)
    return values.new_empty((), dtype=dtype), values.new_empty(len(reference.STATS), dtype=torch.float32), grad, share


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    ctx.save_for_backward(present(output[2]), present(output[3]))
    ctx.dtype, ctx.backend = inputs[0].dtype, inputs[-1]


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    d_values, share = ctx.saved_tensors
    return loss_gradient(d_values, grad, share, ctx.dtype, ctx.backend), *[None] * 10


_value_loss = Op(
    "value_loss",
    "(Tensor values, Tensor? old_values, Tensor returns, Tensor? mask, Tensor? cu_seqlens, Tensor? given, float clip, "
    "int reduction, float denominator, bool grad, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    _setup,
    _backward,
)
