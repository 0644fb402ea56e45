"""The regression loss of attribute and scalar reward models."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.preference_loss import reference
from . import checks
from .backend import (
    address,
    choose,
    elements,
    empty,
    empty_scalar,
    empty_stats,
    extension,
    flat,
    in_line,
    result_dtype_on,
    triton_kernels,
)
from .library import Op, present
from .stats import LossStats

_REGRESSION_STATS = ("mse", "mae", "count")


class RegressionLoss(NamedTuple):
    """`loss` 0-dim, differentiable; `stats` a `LossStats`."""

    loss: Tensor
    stats: LossStats


def regression_loss(
    predictions: Tensor, targets: Tensor, *, ignore_value: float = -100.0, backend: str | None = None
) -> RegressionLoss:
    """Mean squared error over the targets that are given: Σ (p - t)² / n over t != ignore_value, 0 where n is 0.

    Args:
        predictions: any shape, floating, e.g. (B, attributes); the gradient flows to it.
        targets: the same shape; `ignore_value` where there is none.
        backend: "triton", "cpu" or "reference"; None chooses.

    Returns:
        `RegressionLoss(loss, stats)`; stats: mse, mae, count.

    Raises:
        TypeError, ValueError: dtype, shape or device that do not fit.

    Source: attribute-conditioned reward models, Dong et al. 2023 (SteerLM).
    """
    checks.tensor("predictions", predictions)
    checks.like("targets", targets, "predictions", predictions)
    checks.number("ignore_value", ignore_value)
    backend = choose("regression_loss", predictions, backend)
    if backend == "reference":
        loss = reference.regression_loss(predictions, targets.detach(), ignore_value=ignore_value)
        counted = targets != ignore_value
        error = torch.where(counted, predictions.detach().float() - targets.float(), torch.zeros((), device=targets.device))
        n = counted.sum()
        values = torch.stack([loss.detach().float(), error.abs().sum() / n.clamp(min=1), n.float()])
        return RegressionLoss(loss, LossStats(values, _REGRESSION_STATS))
    grad = torch.is_grad_enabled() and predictions.requires_grad
    loss, stats, _ = _regression_loss(predictions, targets, float(ignore_value), grad, backend)
    return RegressionLoss(loss, LossStats(stats.detach() if stats.requires_grad else stats, _REGRESSION_STATS))


def _regression_forward(
    predictions: Tensor, targets: Tensor, ignore_value: float, grad: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    dtype = result_dtype_on("regression_loss", backend, predictions, targets)
    loss, stats = empty_scalar(dtype, predictions), empty_stats(_REGRESSION_STATS, predictions)
    d = empty(predictions.shape, dtype, predictions) if grad else None
    if backend == "triton":
        triton_kernels("preference_loss").regression_loss(
            flat(predictions), flat(targets), ignore_value=ignore_value, loss=loss, grad=d, stats=stats
        )
        return loss, stats, d
    p, t = in_line(predictions), in_line(targets)
    extension().regression_loss(
        p.numel(), dtype == torch.float64, elements(p), elements(t), ignore_value, loss.data_ptr(), address(d), stats.data_ptr()
    )
    return loss, stats, d


def _regression_fake(
    predictions: Tensor, targets: Tensor, ignore_value: float, grad: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    dtype = torch.float64 if torch.float64 in (predictions.dtype, targets.dtype) else torch.float32
    d = predictions.new_empty(predictions.shape, dtype=dtype) if grad else None
    return predictions.new_empty((), dtype=dtype), predictions.new_empty(len(_REGRESSION_STATS), dtype=torch.float32), d


def _regression_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor | None]) -> None:
    ctx.save_for_backward(present(output[2]))
    ctx.dtype, ctx.shape = inputs[0].dtype, inputs[0].shape


def _regression_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    (d,) = ctx.saved_tensors
    return grad.new_zeros(ctx.shape, dtype=ctx.dtype) if d is None else (d * grad).to(ctx.dtype), *[None] * 4


_regression_loss = Op(
    "regression_loss",
    "(Tensor predictions, Tensor targets, float ignore_value, bool grad, str backend) -> (Tensor, Tensor, Tensor)",
    _regression_forward,
    _regression_fake,
    _regression_setup,
    _regression_backward,
)
