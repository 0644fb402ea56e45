"""Masked statistics and sums over sequences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .native import address, empty, extension, line, number, rows, same_shape, tokens, wide
from .view import FLOATS, INTEGERS, MASKS, View, give_back, view


def _flat(x: Any, mask: Any) -> tuple[View, View | None]:
    v = view("x", x, FLOATS)
    m = None if mask is None else view("mask", mask, MASKS)
    same_shape("mask", m, "x", v)
    for name, w in (("x", v), ("mask", m)):
        if w is not None and not w.contiguous:
            raise ValueError(f"{name}: must be contiguous, got strides {w.strides}")
    return v, m


def masked_mean(x: Any, mask: Any = None) -> float:
    """`fastrlhf.masked_mean` over all elements."""
    v, m = _flat(x, mask)
    native, lane = extension("masked_mean", v)
    out = np.empty((), np.float64 if wide(v) else np.float32)
    native.row_sums((1, v.size, 0, 0), wide(v), line(v), None if m is None else line(m), True, address(out), 0, lane)
    return float(out)


def masked_var(x: Any, mask: Any = None, *, unbiased: bool = True) -> float:
    """`fastrlhf.masked_var`."""
    v, m = _flat(x, mask)
    native, lane = extension("masked_var", v)
    n, _, m2 = native.moments((1, v.size, 0, 0), wide(v), line(v), None if m is None else line(m), lane)
    over = n - 1 if unbiased else n
    return m2 / over if over > 0 else 0.0


def whiten(x: Any, mask: Any = None, *, shift_mean: bool = True, unbiased: bool = True, eps: float = 1e-8) -> Any:
    """`fastrlhf.whiten`."""
    v = view("x", x, FLOATS)
    in_rows = len(v.shape) in (1, 2)
    m = None if mask is None else view("mask", mask, MASKS)
    same_shape("mask", m, "x", v)
    if not in_rows:
        v, m = _flat(x, mask)
    number("eps", eps, 0.0, math.inf)
    native, lane = extension("whiten", v)
    out = empty(x, v, v.shape, wide(v))
    shape, given = (rows(v), tokens(v)) if in_rows else ((1, v.size, 0, 0), line(v))
    weights = tokens(m) if in_rows or m is None else line(m)
    native.whiten(shape, wide(v), given, weights, shift_mean, unbiased, float(eps), address(out), lane)
    return give_back(x, out)


def sequence_logprobs(logprobs: Any, mask: Any = None, *, cu_seqlens: Any = None, average: bool = False) -> Any:
    """`fastrlhf.sequence_logprobs` of (B, T), or packed (total) with cu_seqlens."""
    v = view("logprobs", logprobs, FLOATS)
    m = None if mask is None else view("mask", mask, MASKS)
    same_shape("mask", m, "logprobs", v)
    cu = boundaries(cu_seqlens)
    if len(v.shape) != (1 if cu is not None else 2):
        raise ValueError(f"logprobs: expected (B, T), or (total) with cu_seqlens, got shape {v.shape}")
    native, lane = extension("sequence_logprobs", v)
    shape = rows(v, cu)
    out = empty(logprobs, v, (shape[0],), wide(v))
    native.row_sums(shape, wide(v), tokens(v), tokens(m), average, address(out), 0, lane)
    return give_back(logprobs, out)


def boundaries(cu_seqlens: Any) -> View | None:
    """Of a pack, int64 on the CPU."""
    if cu_seqlens is None:
        return None
    given = view("cu_seqlens", cu_seqlens, INTEGERS)
    if len(given.shape) != 1 or given.shape[0] == 0:
        raise ValueError(f"cu_seqlens: expected shape (B + 1,), got {given.shape}")
    if given.dtype == "int64" and given.contiguous:
        return given
    return view("cu_seqlens", np.ascontiguousarray(np.asarray(cu_seqlens), dtype=np.int64), INTEGERS)
