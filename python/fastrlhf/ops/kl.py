"""KL divergence: per-token estimators, the full-vocabulary divergence, and the controllers of its coefficient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..kernels.kl import reference
from . import checks
from .backend import (
    address,
    choose,
    elements,
    empty,
    empty_as,
    extension,
    flat,
    in_line,
    matrix,
    result_dtype,
    result_dtype_on,
    threads,
    triton_kernels,
    with_rows,
)
from .library import Op


def kl(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    kind: str = "k3",
    clamp_input: float | None = None,
    clamp_output: float | None = None,
    straight_through: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Per-token estimate of KL(policy || ref) from sampled tokens.

    With d = logprobs - ref_logprobs: ``k1`` d; ``abs`` |d|; ``k2`` d²/2; ``k3`` e^(-d) - 1 + d, the last without
    cancellation for small d. Differentiable in both arguments.

    Args:
        logprobs, ref_logprobs: one shape, any; floating.
        kind: "k1", "abs", "k2" or "k3".
        clamp_input: d is clamped to ±this first (nats). k3 of d = -59 is 4e25: a bound of 20 is usual.
        clamp_output: the result is clamped to ±this.
        straight_through: the value of `kind` with the gradient of k2 (verl's "+"): unbiased for the KL's gradient.
        backend: "triton", "cpu" or "reference"; None chooses.

    Returns:
        float32 (float64 for float64 inputs), the inputs' shape, in nats.

    Raises:
        TypeError, ValueError: dtype, shape or device that do not fit, an unknown kind, a clamp that is not > 0.

    Source: J. Schulman, "Approximating KL divergence", 2020.
    """
    checks.tensor("logprobs", logprobs)
    checks.like("ref_logprobs", ref_logprobs, "logprobs", logprobs)
    code = checks.one_of("kind", kind, reference.KINDS)
    checks.positive_or_none("clamp_input", clamp_input)
    checks.positive_or_none("clamp_output", clamp_output)
    backend = choose("kl", logprobs, backend)
    if backend == "reference":
        return reference.kl(
            logprobs, ref_logprobs, kind=kind, clamp_input=clamp_input, clamp_output=clamp_output,
            straight_through=straight_through,
        )  # fmt: skip
    return _kl(logprobs, ref_logprobs, code, clamp_input or math.inf, clamp_output or math.inf, straight_through, backend)


def _run_kl(logprobs: Tensor, ref: Tensor, options: tuple[Any, ...], grad: Tensor | None, backend: str) -> Tensor:
    dtype = result_dtype_on("kl", backend, logprobs, ref)
    out = empty_as(logprobs, dtype)
    if backend == "triton":
        kind, clamp_input, clamp_output, straight_through = options
        triton_kernels("kl").kl(
            flat(logprobs), flat(ref), None if grad is None else flat(grad), kind=kind, clamp_input=clamp_input,
            clamp_output=clamp_output, straight_through=straight_through, out=out,
        )  # fmt: skip
        return out
    x, y, shape = in_line(logprobs), in_line(ref), (1, logprobs.numel(), 0, 0)
    extension().kl(shape, dtype == torch.float64, elements(x), elements(y), *options, address(grad), out.data_ptr(), threads())
    return out


def _kl_forward(
    logprobs: Tensor, ref: Tensor, kind: int, clamp_input: float, clamp_output: float, straight_through: bool, backend: str
) -> Tensor:
    return _run_kl(logprobs, ref, (kind, clamp_input, clamp_output, straight_through), None, backend)


def _kl_grad(
    logprobs: Tensor, ref: Tensor, grad: Tensor, kind: int, clamp_input: float, clamp_output: float, straight_through: bool,
    backend: str,
) -> Tensor:  # fmt: skip
    return _run_kl(logprobs, ref, (kind, clamp_input, clamp_output, straight_through), grad.contiguous(), backend)


def _fake_like(logprobs: Tensor, ref: Tensor, *_: Any) -> Tensor:
    dtype = torch.float64 if torch.float64 in (logprobs.dtype, ref.dtype) else torch.float32
    return logprobs.new_empty(logprobs.shape, dtype=dtype)


_KL_OPTIONS = "int kind, float clamp_input, float clamp_output, bool straight_through, str backend"
_kl_backward = Op("kl_backward", f"(Tensor logprobs, Tensor ref, Tensor grad, {_KL_OPTIONS}) -> Tensor", _kl_grad, _fake_like)


def _setup_kl(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.options = inputs[2:]


def _backward_kl(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    logprobs, ref = ctx.saved_tensors
    g = _kl_backward(logprobs, ref, grad, *ctx.options)
    return g.to(logprobs.dtype), -g.to(ref.dtype), *[None] * 5


_kl = Op("kl", f"(Tensor logprobs, Tensor ref, {_KL_OPTIONS}) -> Tensor", _kl_forward, _fake_like, _setup_kl, _backward_kl)


def kl_full(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    direction: str = "forward",
    temperature: float = 1.0,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """KL divergence over the whole vocabulary, from two logit tensors, each read from memory once.

    With P = softmax(logits/T), Q = softmax(ref_logits/T), M = (P + Q)/2::

        forward KL(Q||P) = Σ Q log(Q/P)     reverse KL(P||Q) = Σ P log(P/Q)     js (KL(P||M) + KL(Q||M))/2

    "forward" is the field's: from the reference or teacher to the policy or student. The expectation that
    `kl(logprobs, ref_logprobs)` estimates from the policy's samples is "reverse". Differentiable in both arguments.

    Args:
        logits, ref_logits: (..., V), one dtype of float32, bfloat16, float16, float64; last stride 1.
        direction: "forward", "reverse" or "js".
        temperature: > 0, of both.
        mask: (...), rows where it is 0 give 0, have no gradient and are not read.
        backend: "triton", "cpu" or "reference"; None chooses.

    Returns:
        (...), float32 (float64 for float64 logits), in nats.

    Raises:
        TypeError, ValueError: dtype, shape or device that do not fit, an unknown direction, a temperature not > 0.

    Source: Kullback & Leibler 1951; Lin 1991 for js.
    """
    shape = checks.logits("logits", logits)
    checks.like("ref_logits", ref_logits, "logits", logits, (logits.dtype,))
    checks.logits("ref_logits", ref_logits)
    code = checks.one_of("direction", direction, reference.DIRECTIONS)
    checks.temperature(temperature)
    if mask is not None:
        checks.tensor("mask", mask, checks.MASKS)
        if mask.shape != shape[:-1]:
            raise ValueError(f"mask: expected shape {tuple(shape[:-1])}, got {checks.shape_of(mask)}")
        checks.same_device("mask", mask, "logits", logits)
    backend = choose("kl_full", logits, backend)
    if backend == "reference":
        return reference.kl_full(logits, ref_logits, direction=direction, temperature=temperature, mask=mask)
    kept = None if mask is None else (mask != 0).contiguous()
    save = torch.is_grad_enabled() and (logits.requires_grad or ref_logits.requires_grad)
    out: Tensor = _kl_full(logits, ref_logits, kept, code, float(temperature), save, backend)[0]
    return out


def _kl_full_forward(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, direction: int, temperature: float, save: bool, backend: str
) -> tuple[Tensor, Tensor | None]:
    x, y, vocab = with_rows(logits), with_rows(ref_logits), logits.shape[-1]
    rows, dtype, lead = logits.numel() // vocab, result_dtype(logits), logits.shape[:-1]
    out = empty(lead, dtype, x)
    stats = empty((*lead, 4), dtype, x) if save else None
    if backend == "triton":
        triton_kernels("kl", "triton_full").kl_full_forward(
            x, y, mask, direction=direction, temperature=temperature, out=out, stats=stats
        )
        return out, stats
    extension().kl_full_forward(
        matrix(x), matrix(y), rows, vocab, direction, temperature, address(mask), out.data_ptr(), address(stats), threads()
    )
    return out, stats


def _kl_full_grad(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, out: Tensor, stats: Tensor, grad: Tensor, direction: int,
    temperature: float, wanted: bool, ref_wanted: bool, backend: str,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    x, y, vocab = with_rows(logits), with_rows(ref_logits), logits.shape[-1]
    dx = empty(x.shape, x.dtype, x) if wanted else None
    dy = empty(y.shape, y.dtype, y) if ref_wanted else None
    grad = grad.contiguous()
    if backend == "triton":
        triton_kernels("kl", "triton_full").kl_full_backward(
            x, y, mask, direction=direction, temperature=temperature, out=out, stats=stats, grad=grad, grad_logits=dx,
            grad_ref_logits=dy,
        )  # fmt: skip
        return None if dx is None else dx.view(logits.shape), None if dy is None else dy.view(logits.shape)
    absent = (0, 0, 1, 0, 0)
    extension().kl_full_backward(
        matrix(x), matrix(y), logits.numel() // vocab, vocab, direction, temperature, address(mask), out.data_ptr(),
        stats.data_ptr(), grad.data_ptr(), absent if dx is None else matrix(dx), absent if dy is None else matrix(dy),
        threads(),
    )  # fmt: skip
    return None if dx is None else dx.view(logits.shape), None if dy is None else dy.view(logits.shape)


def _fake_kl_full(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    stats = logits.new_empty((*logits.shape[:-1], 4), dtype=dtype) if rest[-2] else None
    return logits.new_empty(logits.shape[:-1], dtype=dtype), stats


_kl_full_backward = Op(
    "kl_full_backward",
    "(Tensor logits, Tensor ref_logits, Tensor? mask, Tensor out, Tensor stats, Tensor grad, int direction, "
    "float temperature, bool wanted, bool ref_wanted, str backend) -> (Tensor, Tensor)",
    _kl_full_grad,
    lambda logits, ref, mask, out, stats, grad, direction, temperature, wanted, ref_wanted, backend: (
        logits.new_empty(logits.shape) if wanted else None,
        ref.new_empty(ref.shape) if ref_wanted else None,
    ),
)


def _setup_kl_full(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.options, ctx.backend = inputs[3:5], inputs[-1]


def _backward_kl_full(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    wanted = ctx.needs_input_grad[:2]
    grads = _kl_full_backward(*ctx.saved_tensors, grad, *ctx.options, *wanted, ctx.backend)
    return *(g if w else None for g, w in zip(grads, wanted, strict=True)), *[None] * 5


_kl_full = Op(
    "kl_full",
    "(Tensor logits, Tensor ref_logits, Tensor? mask, int direction, float temperature, bool save, str backend) "
    "-> (Tensor, Tensor)",
    _kl_full_forward,
    _fake_kl_full,
    _setup_kl_full,
    _backward_kl_full,
)


class FixedKL:
    """A KL coefficient that stays what it is."""

    def __init__(self, coef: float) -> None:
        checks.number("coef", coef, low=0)
        self.coef = coef

    def update(self, observed: float, samples: int) -> float:
        """The coefficient after a rollout of `samples` sequences with mean KL `observed`."""
        return self.coef


class AdaptiveKL:
    """A KL coefficient that follows a target: coef *= 1 + clip(observed/target - 1, ±0.2) · samples / horizon.

    Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", §2.2.
    """

    def __init__(self, initial: float, target: float, horizon: float) -> None:
        checks.number("initial", initial, low=0)
        checks.number("target", target, low=0, open_low=True)
        checks.number("horizon", horizon, low=0, open_low=True)
        self.coef, self.target, self.horizon = initial, target, horizon

    def update(self, observed: float, samples: int) -> float:
        """The coefficient after a rollout of `samples` sequences with mean KL `observed`, in nats."""
        checks.number("observed", observed)
        error = min(max(observed / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * samples / self.horizon
        return self.coef
