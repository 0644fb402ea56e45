"""TRL's seams, read in 1.13 to 1.16 and run against 1.16.0."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ..seam import Call, Host, Seam, Sizes, decline, in_place_of, obstacle
from . import semantics
from .inputs import inputs
from .trl_linear import chunked_logprobs, chunked_logprobs_calls

UTILS = "trl.trainer.utils"


def fused_on_gpu(original: Any, logits: Tensor, index: Tensor | None, row_mask: Tensor | None) -> bool:
    """Whether TRL's own kernel, whose results are float32, would serve the call; its fallback rounds to the logits' dtype."""
    names = original.__globals__
    if not logits.is_cuda or names.get("_fused_logprob_entropy") is None:
        return False
    supports = names.get("_supports_trl_loss_kernel")
    arguments = (logits,) if index is None else (logits, index) if row_mask is None else (logits, index, row_mask)
    return bool(supports and supports(*arguments))


def check_temperature(original: Any, temperature: float) -> None:
    if "temperature" in inspect.signature(original).parameters and temperature <= 0:
        raise ValueError("temperature must be positive")


def arguments_obstacle(logits: Any, index: Any, row_mask: Any) -> str | None:
    reason = obstacle(logits)
    if reason is not None:
        return reason
    if index.dtype not in (torch.int32, torch.int64):
        return f"an index of {index.dtype}"
    if index.shape != logits.shape[:-1] and index.shape[:-1] != logits.shape[:-1]:
        return "an index that is broadcast"
    return "a row mask of another shape" if row_mask is not None and row_mask.shape != logits.shape[:-1] else None


def masked_labels(index: Tensor, row_mask: Tensor | None) -> Tensor:
    """Rows that the mask leaves out are not read."""
    if row_mask is None:
        return index
    keep = row_mask != 0
    return torch.where(keep if index.dim() == keep.dim() else keep.unsqueeze(-1), index, semantics.NO_LABEL)


def selective_log_softmax(original: Any) -> Any:
    @in_place_of(original)
    def replacement(logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None) -> Tensor:
        check_temperature(original, temperature)
        reason = arguments_obstacle(logits, index, row_mask)
        if reason is not None:
            decline("trl selective_log_softmax", reason)
            options = {"temperature": temperature, "row_mask": row_mask} if temperature != 1.0 or row_mask is not None else {}
            return original(logits, index, **options)
        dtype = torch.float32 if fused_on_gpu(original, logits, index, row_mask) else logits.dtype
        return semantics.logprobs(logits, masked_labels(index, row_mask), dtype=dtype, temperature=temperature)

    return replacement


def entropy_from_logits(original: Any) -> Any:
    @in_place_of(original)
    def replacement(logits: Tensor, chunk_size: int = 128) -> Tensor:
        reason = obstacle(logits)
        if reason is not None:
            decline("trl entropy_from_logits", reason)
            return original(logits, chunk_size)
        return semantics.entropy(logits, dtype=torch.float32 if fused_on_gpu(original, logits, None, None) else logits.dtype)

    return replacement


def selective_log_softmax_and_entropy(original: Any) -> Any:
    @in_place_of(original)
    def replacement(
        logits: Tensor, index: Tensor, entropy_requires_grad: bool = True, temperature: float = 1.0,
        row_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        check_temperature(original, temperature)
        reason = arguments_obstacle(logits, index, row_mask) or (
            "an index of several columns" if index.dim() == logits.dim() else None
        )
        if reason is not None:
            decline("trl selective_log_softmax_and_entropy", reason)
            return original(logits, index, entropy_requires_grad, temperature, row_mask)
        dtype = torch.float32 if fused_on_gpu(original, logits, index, row_mask) else logits.dtype
        out = ops.logprobs(
            logits, masked_labels(index, row_mask), temperature=temperature, ignore_index=semantics.NO_LABEL, entropy=True
        )
        assert out.entropy is not None
        entropy = out.entropy if entropy_requires_grad else out.entropy.detach()
        return out.logprobs.to(dtype), entropy.to(dtype)

    return replacement


def logits_calls(*, both: bool) -> Any:
    def calls(sizes: Sizes) -> Iterator[Call]:
        make = inputs(sizes)
        x, y = make.logits(sizes.rows, sizes.length), make.labels(sizes.rows, sizes.length)
        loose = 2e-2 if sizes.dtype in (torch.bfloat16, torch.float16) else None
        yield Call("plain", (x, y), grads=(0,), tolerance=loose)
        yield Call("temperature", (x, y), {"temperature": 0.7}, grads=(0,), tolerance=loose and 0.1)
        yield Call("a row mask with gaps", (x, y), {"row_mask": make.mask(torch.int64)}, grads=(0,), tolerance=loose)
        yield Call("a temperature of 0", (x, y), {"temperature": 0.0}, raises=ValueError)
        if both:
            yield Call("entropy without gradient", (x, y), {"entropy_requires_grad": False}, grads=(0,), tolerance=loose)
        else:
            several = torch.stack([y, y.flip(-1)], -1)
            yield Call("several labels a row", (x, several), grads=(0,), tolerance=loose)
        if sizes == Sizes():
            half = 0.1 if both else 2e-2
            yield Call("bfloat16", (x.bfloat16(), y), grads=(0,), tolerance=half)
            yield Call("float64", (x.double(), y), grads=(0,))
            yield Call("a label of -100", (x, torch.full_like(y, -100)), raises=(RuntimeError, IndexError))
        shifted = make.logits(sizes.rows, sizes.length)
        shifted[..., ::3] = -torch.inf
        first = torch.ones_like(y)
        if sizes.dtype == torch.float32:
            yield Call("-inf logits", (shifted, first), differs="0 · -inf is NaN in the host's entropy" if both else None)

    return calls


def entropy_calls(sizes: Sizes) -> Iterator[Call]:
    make = inputs(sizes)
    x = make.logits(sizes.rows, sizes.length)
    loose = 0.1 if sizes.dtype in (torch.bfloat16, torch.float16) else None
    yield Call("plain", (x,), grads=(0,), tolerance=loose)
    if sizes == Sizes():
        yield Call("bfloat16", (x.bfloat16(),), grads=(0,), tolerance=0.1)
        yield Call("float64", (x.double(),), grads=(0,))
    masked = make.logits(sizes.rows, sizes.length)
    masked[..., ::3] = -torch.inf
    yield Call("-inf logits", (masked,), differs="0 · -inf is NaN in the host's entropy")


SEAMS = (
    Seam(UTILS, "selective_log_softmax", selective_log_softmax, logits_calls(both=False), "logprobs"),
    Seam(UTILS, "entropy_from_logits", entropy_from_logits, entropy_calls, "logprobs"),
    Seam(
        UTILS, "selective_log_softmax_and_entropy", selective_log_softmax_and_entropy, logits_calls(both=True), "logprobs"
    ),
    Seam(
        UTILS, "_ChunkedLogProbFunction", chunked_logprobs, chunked_logprobs_calls, "linear_logprobs",
        function=lambda held: held.apply,
    ),
)  # fmt: skip
HOST = Host("trl", "trl", "trl", ("1.13", "1.16"), SEAMS)
