"""TRL's log-probs from hidden states (from 1.15 every stable trainer's), and the metrics that it takes from the same tiles."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ..seam import Call, Sizes, decline, obstacle
from ..signatures import signature_of
from .inputs import inputs

TILE = 64 << 20  # bytes of logits at a time, for the rows of which neither probability nor entropy says whether they are top
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
Outputs = tuple[Tensor | None, ...]


def chunked_logprobs(original: Any) -> Any:
    """In the place of the autograd function: a class with its `apply`. Before 1.15 it gave log-probs and entropy alone."""
    chooses = "outputs" in signature_of(original).parameters

    class ChunkedLogProb:
        __fastrlhf__ = True

        @staticmethod
        def apply(
            hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk_size: int,
            final_logit_softcapping: float | None = None, logit_scale: float = 1.0, outputs: tuple[str, ...] = OUTPUTS,
        ) -> Outputs:  # fmt: skip
            if not chooses:
                outputs = ("entropy",)
            reason = _obstacle(hidden, weight, temperature, final_logit_softcapping, logit_scale, outputs)
            if reason is not None:
                decline("trl _ChunkedLogProbFunction", reason)
                given = (hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale)
                return original.apply(*given, outputs) if chooses else original.apply(*given)
            out = _from_hidden(hidden, weight, bias, targets, temperature, final_logit_softcapping, logit_scale, outputs)
            return out if chooses else out[:2]

    ChunkedLogProb.__name__ = ChunkedLogProb.__qualname__ = original.__name__
    ChunkedLogProb.__module__ = original.__module__
    return ChunkedLogProb


def _obstacle(
    hidden: Tensor, weight: Tensor, temperature: float, softcap: float | None, scale: float, outputs: tuple[str, ...]
) -> str | None:
    reason = obstacle(hidden, "linear_logprobs") or obstacle(weight, "linear_logprobs")
    if reason is not None:
        return reason
    if "log_sum_sq_probs" in outputs:
        return "log Σ p² among the outputs (DPO with use_weighting)"
    if not scale > 0:
        return f"a logit scale of {scale}"
    if softcap is not None and "mean_logits" in outputs:
        return "mean logits under a soft cap"
    if weight.numel() == 0 or _zero3():
        return "a head that ZeRO-3 gathers"
    return None


def _zero3() -> bool:
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


def _from_hidden(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, softcap: float | None,
    scale: float, outputs: tuple[str, ...],
) -> Outputs:  # fmt: skip
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        h, w = hidden.to(dtype), weight.to(dtype)
        b = None if bias is None else bias.to(dtype)
        # softcap·tanh(scale·z/softcap)/T = softcap'·tanh(z/softcap')/T' with both divided by the scale
        out = ops.linear_logprobs(
            h, w, targets, bias=b, temperature=temperature / scale, softcap=None if softcap is None else softcap / scale,
            entropy="entropy" in outputs or "is_top1" in outputs,
        )  # fmt: skip
        with torch.no_grad():
            mean = _mean_logits(h, w, b, scale / temperature) if "mean_logits" in outputs else None
            top = None
            if out.entropy is not None and "is_top1" in outputs:
                top = _is_top1(h, w, b, targets, out.logprobs, out.entropy)
    return out.logprobs, out.entropy if "entropy" in outputs else None, None, mean, top


def _mean_logits(h: Tensor, w: Tensor, b: Tensor | None, factor: float) -> Tensor:
    """The mean over the vocabulary is linear in the hidden state: no logits."""
    mean = h.float() @ w.mean(0, dtype=torch.float32)
    return (mean if b is None else mean + b.mean(dtype=torch.float32)) * factor


def _is_top1(h: Tensor, w: Tensor, b: Tensor | None, targets: Tensor, logprobs: Tensor, entropy: Tensor) -> Tensor:
    """Whether the target is the first largest logit. p > 1/2 is; p < e^-H is not, as H >= -log max p; the other rows'
    logits are computed in the hidden states' dtype, as TRL does."""
    slack = 1e-3
    top = logprobs > math.log(0.5) + slack
    open_rows = (~top & (logprobs > -entropy - slack)).nonzero().squeeze(-1)
    for rows in open_rows.split(max(1, TILE // (w.shape[0] * 4))):
        logits = h[rows] @ w.t()
        if b is not None:
            logits += b
        y = targets[rows].unsqueeze(-1)
        own = logits.gather(-1, y)
        first = torch.arange(w.shape[0], device=w.device) < y
        top[rows] = ((logits < own) | ((logits == own) & ~first)).all(-1)
    return top


def chunked_logprobs_calls(sizes: Sizes) -> Iterator[Call]:
    make = inputs(sizes)
    rows = sizes.rows * 8
    h, w, y = make.normal(rows, sizes.hidden), make.head(), make.labels(rows)
    b = make.normal(sizes.vocab)
    half = sizes.dtype in (torch.bfloat16, torch.float16)
    tight = 0.2 if half else 1e-4
    both = ("log_probs", "entropy")
    yield Call("plain", (h, w, None, y, 1.0, 32, None, 1.0, both), grads=(0, 1), tolerance=tight)
    older = (h, w, b, y, 0.9, 32, 5.0, 0.6)
    yield Call("both, before 1.15", older, grads=(0, 1, 2), tolerance=tight, without=("outputs",))
    yield Call("bias, temperature", (h, w, b, y, 0.7, 32, None, 1.0, both), grads=(0, 1, 2), tolerance=tight)
    yield Call("soft cap, scale", (h, w, None, y, 0.9, 32, 5.0, 0.6, both), grads=(0, 1), tolerance=tight)
    yield Call("log-probs alone", (h, w, None, y, 1.0, 32, None, 1.0, ("log_probs",)), grads=(0, 1), tolerance=tight)
    if half:
        return
    logits = h @ w.t()
    near = torch.where(torch.arange(rows, device=y.device) % 2 == 0, logits.argmax(-1), y)
    metrics = ("log_probs", "entropy", "mean_logits", "is_top1")
    yield Call("SFT's and DPO's metrics", (h, w, b * 0, near, 1.0, 32, None, 1.3, metrics), grads=(0, 1), tolerance=tight)
    if sizes == Sizes():
        low = (h.bfloat16(), w.bfloat16(), None, y, 1.0, 32, None, 1.0, both)
        yield Call("bfloat16", low, grads=(0, 1), tolerance=0.2)
