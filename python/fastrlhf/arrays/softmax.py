"""Log-probs, entropy, KL."""

from __future__ import annotations

from typing import Any, NamedTuple

from .native import address, bound, empty, extension, line, matrix, number, one_of, same_shape, wide
from .view import CODES, CPU, FLOATS, INTEGERS, MASKS, give_back, view

KINDS = ("k1", "abs", "k2", "k3")
DIRECTIONS = ("forward", "reverse", "js")


class Logprobs(NamedTuple):
    """Results of `logprobs`; None where not asked for."""

    logprobs: Any
    entropy: Any
    lse: Any


def logprobs(
    logits: Any, labels: Any, *, temperature: float = 1.0, softcap: float | None = None, ignore_index: int = -100,
    entropy: bool = False, lse: bool = False,
) -> Logprobs:  # fmt: skip
    """`fastrlhf.logprobs` of logits (..., V) and labels (...) or (..., K), int32 or int64; temperature a number."""
    x, y = view("logits", logits, FLOATS), view("labels", labels, INTEGERS)
    lead = x.shape[:-1]
    cut = matrix("logits", x)
    if y.shape != lead and not (len(y.shape) == len(x.shape) and y.shape[:-1] == lead and y.shape[-1] > 0):
        raise ValueError(f"labels: expected shape {lead} or {lead} + (K,) for logits {x.shape}, got {y.shape}")
    if not y.contiguous:
        raise ValueError(f"labels: must be contiguous, got strides {y.strides}")
    if y.device != x.device:
        raise ValueError("labels: must be where logits are")
    number("temperature", temperature, 1e-20, 1e20)
    vocab = x.shape[-1]
    count = x.size // vocab
    native, lane = extension("logprobs", x, on_gpu=True)
    out = [empty(logits, x, shape, wide(x)) if w else None for shape, w in ((y.shape, True), (lead, entropy), (lead, lse))]
    native.logprobs_forward(
        cut, count, vocab, (y.pointer, CODES[y.dtype], y.size // count if count else 1, 0, vocab, ignore_index),
        (float(temperature), 0, 0.0 if softcap is None else bound("softcap", softcap)), (0, 0, 0, 0, vocab),
        (*(address(o) for o in out), 0, 0), 0, lane,
    )  # fmt: skip
    return Logprobs(*(o if o is None else give_back(logits, o) for o in out))


def kl(
    logprobs: Any, ref_logprobs: Any, *, kind: str = "k3", clamp_input: float | None = None, clamp_output: float | None = None
) -> Any:
    """`fastrlhf.kl` of two arrays of one shape."""
    a, b = view("logprobs", logprobs, FLOATS), view("ref_logprobs", ref_logprobs, FLOATS)
    same_shape("ref_logprobs", b, "logprobs", a)
    for name, v in (("logprobs", a), ("ref_logprobs", b)):
        if not v.contiguous:
            raise ValueError(f"{name}: must be contiguous, got strides {v.strides}")
    code = one_of("kind", kind, KINDS)
    native, lane = extension("kl", a)
    out = empty(logprobs, a, a.shape, wide(a, b))
    native.kl(
        (1, a.size, 0, 0), wide(a, b), line(a), line(b), code, bound("clamp_input", clamp_input),
        bound("clamp_output", clamp_output), False, 0, address(out), lane,
    )  # fmt: skip
    return give_back(logprobs, out)


def kl_full(logits: Any, ref_logits: Any, *, direction: str = "forward", temperature: float = 1.0, mask: Any = None) -> Any:
    """`fastrlhf.kl_full` of two arrays (..., V) of one dtype; mask (...), bool or uint8, contiguous."""
    x, y = view("logits", logits, FLOATS), view("ref_logits", ref_logits, FLOATS)
    same_shape("ref_logits", y, "logits", x)
    if x.dtype != y.dtype:
        raise TypeError(f"ref_logits: expected {x.dtype}, got {y.dtype}")
    code = one_of("direction", direction, DIRECTIONS)
    number("temperature", temperature, 1e-20, 1e20)
    m = None if mask is None else view("mask", mask, MASKS[:2])
    if m is not None and (m.shape != x.shape[:-1] or not m.contiguous or m.device != CPU):
        raise ValueError(f"mask: expected a contiguous array of shape {x.shape[:-1]}, got {m.shape}")
    native, lane = extension("kl_full", x)
    out = empty(logits, x, x.shape[:-1], wide(x))
    native.kl_full_forward(
        matrix("logits", x), matrix("ref_logits", y), x.size // x.shape[-1], x.shape[-1], code, float(temperature),
        0 if m is None else m.pointer, address(out), 0, lane,
    )  # fmt: skip
    return give_back(logits, out)
