"""Masked mean, variance and whitening: shift-protected, and across ranks when given a group."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..kernels.masked_stats import reference
from . import checks, value_checks
from .backend import (
    address,
    choose,
    counter,
    cuda_extension,
    empty,
    empty_as,
    empty_scalar,
    extension,
    flat,
    raw_stream,
    result_dtype,
    result_dtype_on,
    row_shape,
    threads,
    tokens,
    triton_kernels,
    workspace,
)
from .distributed import all_reduce_sum, merge_moments
from .library import Op, present


def masked_mean(
    x: Tensor, mask: Tensor | None, dim: int | None = None, *, group: Any = None, backend: str | None = None
) -> Tensor:
    """Mean of the elements that a mask counts: Σ m x / Σ m, 0 where nothing counts.

    Args:
        x: any shape, floating. Elements of weight 0 may hold anything.
        mask: x's shape, bool or weights; None counts all.
        dim: reduce this dimension only; None reduces all.
        group: a process group to take the mean over (with dim=None); the gradient is this rank's share of it.
        backend: "cuda", "triton", "cpu" or "reference"; None chooses.

    Returns:
        0-dim, or x's shape without `dim`; float32 (float64 for float64 x). Differentiable in x.

    Raises:
        TypeError, ValueError, IndexError: dtype, shape or device that do not fit, a dim that x does not have.
    """
    _check(x, mask)
    if dim is not None and not -x.dim() <= dim < x.dim():
        raise IndexError(f"dim: expected in [{-x.dim()}, {x.dim()}) for x {checks.shape_of(x)}, got {dim}")
    if group is not None and dim is not None:
        raise ValueError("group: a mean across ranks is over all elements; dim must be None")
    backend = choose("masked_mean", x, backend)
    if backend == "reference":
        if group is not None:
            values, weights = reference.weighted(x, mask)
            return _mean_over_ranks((values * weights).sum(), weights.sum(), group)
        return reference.masked_mean(x, mask, dim)
    if dim is None:
        if group is not None:
            total, count = row_sums(flat(x), None if mask is None else flat(mask), False, counts=True, backend=backend)
            return _mean_over_ranks(total, count, group)
        mean: Tensor = row_sums(flat(x), None if mask is None else flat(mask), True, backend=backend)[0]
        return mean
    moved = x.movedim(dim, -1)
    moved_mask = None if mask is None else mask.movedim(dim, -1)
    rows = moved.shape[:-1]
    if moved.dim() == 1:
        return masked_mean(x, mask, backend=backend)
    wide = moved.reshape(math.prod(rows), moved.shape[-1])
    wide_mask = None if moved_mask is None else moved_mask.reshape(wide.shape)
    means: Tensor = row_sums(wide, wide_mask, True, backend=backend)[0]
    return means.reshape(rows)


def _mean_over_ranks(total: Tensor, count: Tensor, group: Any) -> Tensor:
    sums = all_reduce_sum(torch.stack([total.detach(), count.detach()]), group)
    over = torch.where(sums[1] != 0, sums[1], torch.ones_like(sums[1]))
    return (sums[0] + total - total.detach()) / over


def masked_var(
    x: Tensor, mask: Tensor | None, *, unbiased: bool = True, group: Any = None, backend: str | None = None
) -> Tensor:
    """Variance of the elements that a mask counts: Σ m (x - mean)² / (Σ m - 1), or / Σ m if not unbiased.

    The sum of squared deviations is taken about the mean and merged pairwise, so a large mean costs no precision.
    0 where the divisor is not positive. Differentiable in x, except across ranks.

    Args:
        x, mask, group, backend: as for `masked_mean`.
        unbiased: divide by Σ m - 1.

    Returns:
        0-dim float32 (float64 for float64 x).

    Raises:
        TypeError, ValueError: dtype, shape or device that do not fit; a gradient asked for with a group.
    """
    _check(x, mask)
    _no_gradient_across_ranks(x, group)
    backend = choose("masked_var", x, backend)
    if group is not None:
        n, _, m2 = merge_moments(moments(flat(x), None if mask is None else flat(mask), backend), group)
        return _variance(n, m2, unbiased).to(result_dtype(x))
    if backend == "reference":
        return reference.masked_var(x, mask, unbiased=unbiased)
    out: Tensor = _var(flat(x), None if mask is None else flat(mask), unbiased, backend)
    return out


def whiten(
    x: Tensor,
    mask: Tensor | None,
    *,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
    group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """Zero mean and unit variance over the elements that a mask counts: (x - mean) / √(var + eps); zeros elsewhere.

    Args:
        x, mask, backend: as for `masked_mean`.
        shift_mean: False adds the mean back.
        unbiased: the variance's divisor is Σ m - 1.
        eps: added to the variance.
        group: a process group whose ranks' elements are whitened together: one all-gather of (n, mean, M2), merged
            pairwise in rank order.

    Returns:
        x's shape, float32 (float64 for float64 x); zeros where the mask is 0, all zeros for an empty mask.
        Differentiable in x, except across ranks.

    Raises:
        TypeError, ValueError: dtype, shape or device that do not fit; a gradient asked for with a group.
    """
    _check(x, mask)
    checks.number("eps", eps, low=0)
    _no_gradient_across_ranks(x, group)
    backend = choose("whiten", x, backend)
    line, line_mask = (x, mask) if x.dim() in (1, 2) else (flat(x), None if mask is None else flat(mask))
    if group is not None:
        of = merge_moments(moments(line, line_mask, backend), group)
        return standardize_by(of, line, line_mask, shift_mean, unbiased, eps, backend).view(x.shape)
    if backend == "reference":
        return reference.whiten(x, mask, shift_mean=shift_mean, unbiased=unbiased, eps=eps)
    save = torch.is_grad_enabled() and x.requires_grad
    out: Tensor = _whiten(line, line_mask, shift_mean, unbiased, eps, save, backend)[0]
    return out if x.dim() in (1, 2) else out.view(x.shape)


def _check(x: Any, mask: Any) -> None:
    checks.tensor("x", x)
    if mask is not None:
        checks.like("mask", mask, "x", x, checks.MASKS)


def _no_gradient_across_ranks(x: Tensor, group: Any) -> None:
    if group is not None and x.requires_grad and torch.is_grad_enabled():
        raise ValueError("group: statistics across ranks have no gradient; detach x or call under torch.no_grad()")


def moments(x: Tensor, mask: Tensor | None, backend: str) -> Tensor:
    """(n, mean, M2) of a (B, T) or (total) tensor: float64 (3), on its device."""
    if backend == "reference":
        values, weights = reference.weighted(x.double(), mask)
        mean = reference.masked_mean(values, weights)
        return torch.stack([weights.sum(), mean, (weights * (values - mean) ** 2).sum()])
    if backend == "cpu":
        return torch.tensor(_cpu_moments(x, mask), dtype=torch.float64, device="cpu")
    return _device_moments(x, mask, False, None, backend)


def _cpu_moments(x: Tensor, mask: Tensor | None) -> tuple[float, float, float]:
    result: tuple[float, float, float] = extension().moments(
        row_shape(x), x.dtype == torch.float64, tokens(x), tokens(mask), threads()
    )
    return result


def _device_moments(x: Tensor, mask: Tensor | None, unbiased: bool, variance: Tensor | None, backend: str) -> Tensor:
    out = empty((3,), torch.float64, x)
    if backend == "triton":
        triton_kernels("masked_stats").moments(x, mask, out, variance, counter(x), unbiased=unbiased)
    else:
        shape = row_shape(x)
        work, ticket = workspace(shape, x), counter(x)
        cuda_extension().moments(
            shape, tokens(x), tokens(mask), out.data_ptr(), address(variance), unbiased, work.data_ptr(), work.numel(),
            ticket.data_ptr(), raw_stream(x),
        )  # fmt: skip
    return out


def _variance(n: Tensor, m2: Tensor, unbiased: bool) -> Tensor:
    over = n - 1 if unbiased else n
    return torch.where(over > 0, m2 / torch.where(over > 0, over, torch.ones_like(over)), torch.zeros_like(m2))


def _shift_and_scale(of: Tensor, unbiased: bool, eps: float) -> Tensor:
    """The mean and 1 / √(var + eps), 0 where that is not defined: float64 (2)."""
    n, mean, m2 = of
    spread = _variance(n, m2, unbiased) + eps
    some = spread > 0
    return torch.stack([mean, torch.where(some, torch.rsqrt(torch.where(some, spread, torch.ones_like(spread))), spread * 0)])


def standardize_by(
    of: Tensor, x: Tensor, mask: Tensor | None, shift_mean: bool, unbiased: bool, eps: float, backend: str,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x whitened by given moments, 0 where the mask does not count; `out` may be x."""
    if backend == "reference":
        shift, scale = _shift_and_scale(of, unbiased, eps)
        kept = torch.ones_like(x, dtype=torch.bool) if mask is None else mask != 0
        white = (x.double() - shift) * scale + (0.0 if shift_mean else shift)
        return torch.where(kept, white, torch.zeros_like(white)).to(result_dtype(x))
    dtype = result_dtype_on("whiten", backend, x)
    if out is None:
        out = empty_as(x, dtype)
    if backend == "cpu":
        shift, scale = _shift_and_scale(of, unbiased, eps).tolist()
        extension().standardize(
            row_shape(x), dtype == torch.float64, tokens(x), tokens(mask), shift, scale, 0.0 if shift_mean else shift,
            out.data_ptr(), threads(),
        )  # fmt: skip
    elif backend == "triton":
        triton_kernels("masked_stats").standardize(x, mask, of, shift_mean=shift_mean, unbiased=unbiased, eps=eps, out=out)
    else:
        cuda_extension().standardize(
            row_shape(x), tokens(x), tokens(mask), of.data_ptr(), shift_mean, unbiased, eps, out.data_ptr(), raw_stream(x)
        )
    return out


def _row_sums_forward(
    x: Tensor, mask: Tensor | None, average: bool, cu_seqlens: Tensor | None, counts: bool, backend: str
) -> tuple[Tensor, Tensor | None]:
    dtype, shape = result_dtype_on("masked_mean", backend, x), row_shape(x, cu_seqlens)
    if value_checks.wanted(backend):
        value_checks.pack(cu_seqlens, x)
    lead = () if x.dim() == 1 and cu_seqlens is None else (shape[0],)
    sums, n = empty(lead, dtype, x), empty(lead, dtype, x) if counts else None
    if backend == "cpu":
        extension().row_sums(
            shape, dtype == torch.float64, tokens(x), tokens(mask), average, sums.data_ptr(), address(n), threads()
        )
    elif backend == "triton":
        triton_kernels("masked_stats").row_sums(x, mask, cu_seqlens, average=average, sums=sums, counts=n, counter=counter(x))
    else:
        work, ticket = workspace(shape, x), counter(x)
        cuda_extension().row_sums(
            shape, tokens(x), tokens(mask), average, sums.data_ptr(), address(n), work.data_ptr(), work.numel(),
            ticket.data_ptr(), raw_stream(x),
        )  # fmt: skip
    return sums, n


def _fake_row_sums(
    x: Tensor, mask: Tensor | None, average: bool, cu_seqlens: Tensor | None, counts: bool, backend: str
) -> tuple[Tensor, Tensor | None]:
    lead = () if x.dim() == 1 and cu_seqlens is None else (x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1,)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(lead, dtype=dtype), x.new_empty(lead, dtype=dtype) if counts else None


def _setup_row_sums(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, mask, ctx.average, cu_seqlens, *_ = inputs
    ctx.save_for_backward(mask, cu_seqlens, present(output[1]))
    ctx.shape, ctx.dtype = x.shape, x.dtype


def _backward_row_sums(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    mask, cu_seqlens, counts = ctx.saved_tensors
    if ctx.average and counts is not None:
        grad = torch.where(counts != 0, grad / counts.where(counts != 0, torch.ones_like(counts)), torch.zeros_like(grad))
    if cu_seqlens is not None:
        g = torch.repeat_interleave(grad, cu_seqlens.diff(), output_size=ctx.shape[0])
    else:
        g = grad.unsqueeze(-1).expand(ctx.shape) if len(ctx.shape) == 2 else grad.expand(ctx.shape)
    g = g if mask is None else g * mask.to(g.dtype)
    return g.to(ctx.dtype), *[None] * 5


_row_sums = Op(
    "row_sums",
    "(Tensor x, Tensor? mask, bool average, Tensor? cu_seqlens, bool counts, str backend) -> (Tensor, Tensor)",
    _row_sums_forward,
    _fake_row_sums,
    _setup_row_sums,
    _backward_row_sums,
)


def row_sums(
    x: Tensor, mask: Tensor | None, average: bool, cu_seqlens: Tensor | None = None, counts: bool = False, *, backend: str
) -> Any:
    """Masked sums (or means) of the rows of (B, T), of a pack, or of (T), which gives one number; and their counts."""
    return _row_sums(x, mask, average, cu_seqlens, counts or (torch.is_grad_enabled() and x.requires_grad), backend)


def _var_forward(x: Tensor, mask: Tensor | None, unbiased: bool, backend: str) -> Tensor:
    out = empty_scalar(result_dtype_on("masked_var", backend, x), x)
    if backend != "cpu":
        _device_moments(x, mask, unbiased, out, backend)
        return out
    n, _, m2 = _cpu_moments(x, mask)
    over = n - 1 if unbiased else n
    return out.fill_(m2 / over if over > 0 else 0.0)


def _setup_var(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.unbiased = inputs[2]


def _centred(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    values, weights = reference.weighted(x, mask)
    mean = reference.masked_mean(values, weights)
    return torch.where(weights != 0, values - mean, torch.zeros_like(values)), weights, weights.sum()


def _backward_var(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, mask = ctx.saved_tensors
    d, weights, n = _centred(x, mask)
    over = n - 1 if ctx.unbiased else n
    scale = torch.where(over > 0, grad / over.where(over > 0, torch.ones_like(over)), torch.zeros_like(grad))
    return (2 * scale * weights * d).to(x.dtype), None, None, None


_var = Op(
    "masked_var",
    "(Tensor x, Tensor? mask, bool unbiased, str backend) -> Tensor",
    _var_forward,
    lambda x, mask, unbiased, backend: x.new_empty((), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32),
    _setup_var,
    _backward_var,
)


def _whiten_forward(
    x: Tensor, mask: Tensor | None, shift_mean: bool, unbiased: bool, eps: float, save: bool, backend: str
) -> tuple[Tensor, Tensor | None]:
    dtype = result_dtype_on("whiten", backend, x)
    if backend != "cpu":
        of = _device_moments(x, mask, unbiased, None, backend)
        white = standardize_by(of, x, mask, shift_mean, unbiased, eps, backend)
        return white, _shift_and_scale(of, unbiased, eps) if save else None
    out = empty_as(x, dtype)
    mean, scale = extension().whiten(
        row_shape(x), dtype == torch.float64, tokens(x), tokens(mask), shift_mean, unbiased, eps, out.data_ptr(), threads()
    )
    return out, torch.tensor([mean, scale], dtype=torch.float64, device="cpu") if save else None


def _fake_whiten(x: Tensor, *_: Any) -> tuple[Tensor, Tensor | None]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(2, dtype=torch.float64) if _[-2] else None


def _setup_whiten(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.options = inputs[2:5]


def _backward_whiten(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    """z = (x - mean) r, r = (var + eps)^(-1/2): dx = r m (g - ḡ - z Σ(g z)/over), + m ḡ where the mean is added back;
    g is 0 where the mask is, ḡ its sum over n."""
    x, mask, mean_and_scale = ctx.saved_tensors
    r = mean_and_scale[1]
    shift_mean, unbiased, _ = ctx.options
    d, weights, n = _centred(x, mask)
    g = torch.where(weights != 0, grad.to(d.dtype), torch.zeros_like(d))
    r = r.to(d.dtype)
    over = n - 1 if unbiased else n
    safe_n, safe_over = torch.where(n != 0, n, torch.ones_like(n)), torch.where(over > 0, over, torch.ones_like(over))
    along = torch.where(over > 0, (g * d).sum() / safe_over, torch.zeros_like(n)) * r * r
    out = r * (g - weights * (g.sum() / safe_n) - weights * d * along)
    if not shift_mean:
        out = out + weights * (g.sum() / safe_n)
    return out.to(x.dtype), *[None] * 6


_whiten = Op(
    "whiten",
    "(Tensor x, Tensor? mask, bool shift_mean, bool unbiased, float eps, bool save, str backend) -> (Tensor, Tensor)",
    _whiten_forward,
    _fake_whiten,
    _setup_whiten,
    _backward_whiten,
)
