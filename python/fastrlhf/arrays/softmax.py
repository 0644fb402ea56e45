"""Log-probs, entropy, KL."""

from __future__ import annotations

from typing import Any, NamedTuple

from .native import address, bound, empty, extension, integer, line, matrix, number, one_of, same_shape, wide
from .view import CODES, CPU, FLOATS, INTEGERS, MASKS, View, give_back, view

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
    x = view("logits", logits, FLOATS)
    cut, lead, vocab = matrix("logits", x), x.shape[:-1], x.shape[-1]
    y, scaling, ignored = _softmax(labels, lead, vocab, "logits", x, temperature, softcap, ignore_index)
    count = x.size // vocab
    native, lane = extension("logprobs", x, on_gpu=True)
    out = [empty(logits, x, shape, wide(x)) if w else None for shape, w in ((y.shape, True), (lead, entropy), (lead, lse))]
    native.logprobs_forward(
        cut, count, vocab, _labels(y, count, vocab, ignored), scaling, (0, 0, 0, 0, vocab),
        (*(address(o) for o in out), 0, 0), 0, lane,
    )  # fmt: skip
    return Logprobs(*(o if o is None else give_back(logits, o) for o in out))


def linear_logprobs(
    hidden: Any, weight: Any, labels: Any, *, bias: Any = None, temperature: float = 1.0, softcap: float | None = None,
    ignore_index: int = -100, entropy: bool = False, lse: bool = False, workspace_bytes: int = 256 << 20,
) -> Logprobs:  # fmt: skip
    """`fastrlhf.linear_logprobs` of hidden (..., H), weight (V, H) and bias (V): no logits; on the CPU."""
    h, w = view("hidden", hidden, FLOATS), view("weight", weight, FLOATS)
    cut, across, lead = matrix("hidden", h), matrix("weight", w), h.shape[:-1]
    if len(w.shape) != 2 or w.shape[1] != h.shape[-1]:
        raise ValueError(f"weight: expected shape (V, {h.shape[-1]}) for hidden {h.shape}, got {w.shape}")
    b = None if bias is None else view("bias", bias, FLOATS)
    if b is not None and (b.shape != w.shape[:1] or not b.contiguous):
        raise ValueError(f"bias: expected a contiguous array of shape {w.shape[:1]}, got {b.shape} with strides {b.strides}")
    for name, v in (("weight", w), ("bias", b)):
        if v is not None and wide(v) != wide(h):
            raise TypeError(f"{name}: {v.dtype} with hidden {h.dtype}; float64 goes with float64 only")
    vocab, count = w.shape[0], h.size // h.shape[-1]
    y, scaling, ignored = _softmax(labels, lead, vocab, "hidden", h, temperature, softcap, ignore_index)
    native, lane = extension("linear_logprobs", h)
    out = [empty(hidden, h, shape, wide(h)) if w else None for shape, w in ((y.shape, True), (lead, entropy), (lead, lse))]
    native.linear_logprobs_forward(
        cut, across, (0, 0) if b is None else (b.pointer, CODES[b.dtype]),
        (count, vocab, h.shape[-1], CODES["float64" if wide(h) else "float32"]), _labels(y, count, vocab, ignored), scaling,
        (0, 0, 0, 0, vocab), (*(address(o) for o in out), 0, 0), 0, 0, integer("workspace_bytes", workspace_bytes, 1), lane,
    )  # fmt: skip
    return Logprobs(*(o if o is None else give_back(hidden, o) for o in out))


def _softmax(
    labels: Any, lead: tuple[int, ...], vocab: int, of: str, first: View, temperature: float, softcap: float | None,
    ignore_index: int,
) -> tuple[View, tuple[float, int, float], int]:  # fmt: skip
    """The labels, (temperature, no temperatures of rows, soft cap) and ignore_index, checked."""
    y = view("labels", labels, INTEGERS)
    if y.shape != lead and not (len(y.shape) == len(lead) + 1 and y.shape[:-1] == lead and y.shape[-1] > 0):
        raise ValueError(f"labels: expected shape {lead} or {lead} + (K,) for {of} {first.shape}, got {y.shape}")
    if not y.contiguous:
        raise ValueError(f"labels: must be contiguous, got strides {y.strides}")
    if y.device != first.device:
        raise ValueError(f"labels: must be where {of} are")
    cap = 0.0 if softcap is None else bound("softcap", softcap)
    return y, (number("temperature", temperature, 1e-20, 1e20), 0, cap), integer("ignore_index", ignore_index)


def _labels(y: View, rows: int, vocab: int, ignore_index: int) -> tuple[int, ...]:
    return (y.pointer, CODES[y.dtype], y.size // rows if rows else 1, 0, vocab, ignore_index)


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
