"""One row's softmax statistics in one read: the maximum m, s = Σ 2^u and t = Σ u 2^u with u = (x - m) c, c = log2(e) / T.

Each lane keeps its own (m, s, t), rescaled when its own maximum rises: nothing crosses threads before the row's end.
The difference is taken before the scale, so that a common offset of the logits costs no precision."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(-200.0)  # of u where it is multiplied: 2^u is 0 there, and 0 · -200 is 0 where 0 · -inf is NaN


@triton.jit
def anchor(m):
    """m, or 0 where nothing but -inf was seen: then x - m is -inf, not NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def accumulate(x, m, s, t, c, WEIGHTED: tl.constexpr):
    """A tile x of `tile_columns` into the lanes' statistics."""
    high = tl.maximum(m, tl.max(tl.max(x, 2), 1))
    base = anchor(high)
    shift = tl.maximum((m - base) * c, FLOOR)
    factor = tl.exp2(shift)
    u = (x - base[:, None, None]) * c
    e = tl.exp2(u)
    if WEIGHTED:
        t = (t + s * shift) * factor + tl.sum(tl.sum(e * tl.maximum(u, FLOOR), 2), 1)
    return high, s * factor + tl.sum(tl.sum(e, 2), 1), t


@triton.jit
def merge_lanes(m, s, t, c, WEIGHTED: tl.constexpr):
    """The row's m (float32), s and t (float64)."""
    high = tl.max(m, 0)
    shift = tl.maximum((m - anchor(high)) * c, FLOOR)
    factor = tl.exp2(shift)
    total = tl.sum((s * factor).to(tl.float64), 0)
    weighted = total * 0
    if WEIGHTED:
        weighted = tl.sum(((t + s * shift) * factor).to(tl.float64), 0)
    return high, total, weighted


@triton.jit
def add_one(m, s, t, z, c):
    """The logit z into a row's statistics."""
    high = tl.maximum(m, z)
    base = anchor(high)
    shift = tl.maximum((m - base) * c, FLOOR)
    factor = tl.exp2(shift)
    u = (z - base) * c
    e = tl.exp2(u)
    return high, s * factor + e, (t + s * shift) * factor + e * tl.maximum(u, FLOOR)


@triton.jit
def log_of_sum(s):
    """log s of a row: the sum is at least 1, its largest term, but for rounding; NaN where there was no term."""
    return tl.where((s > 0) & (s < 1), 0.0, tl.log(tl.where(s == 0, float("nan"), s)))
