"""The mathematics of kl_math.h for Triton: Schulman's estimators of d = logprobs - ref_logprobs and their slopes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def accurate_exp(x):
    """e^x to about 2 units in the last place at any size of x: `tl.exp` rounds x log2(e) first, which costs |x| of them."""
    x = tl.where(x > 128.0, 128.0, tl.where(x < -128.0, -128.0, x))
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    n = tl.where(n > 127.0, 127.0, n)
    r = tl.fma(n, 2.12194440e-4, tl.fma(n, -0.693359375, x))
    return tl.exp(r) * tl.exp2(n)


@triton.jit
def expm1_minus_x(x, exp_x):
    """e^x - 1 - x of x and e^x, by its series where that would cancel."""
    q = tl.fma(x, 2.48015873e-5, 1.98412698e-4)
    q = tl.fma(q, x, 1.38888889e-3)
    q = tl.fma(q, x, 8.33333333e-3)
    q = tl.fma(q, x, 4.16666667e-2)
    q = tl.fma(q, x, 1.66666667e-1)
    q = tl.fma(q, x, 0.5)
    return tl.where(tl.abs(x) < 0.5, q * x * x, exp_x - 1.0 - x)


@triton.jit
def bounded(x, bound):
    """x within ±bound; NaN stays."""
    return tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))


@triton.jit
def kl_value(d, KIND: tl.constexpr):
    if KIND == 0:
        return d
    elif KIND == 1:
        return tl.abs(d)
    elif KIND == 2:
        return d * d * 0.5
    else:
        return expm1_minus_x(-d, accurate_exp(-d))


@triton.jit
def kl_slope(d, KIND: tl.constexpr):
    if KIND == 0:
        return tl.full(d.shape, 1.0, tl.float32)
    elif KIND == 1:
        return tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))
    elif KIND == 2:
        return d
    else:
        exp_d = accurate_exp(-d)
        return tl.where(tl.abs(d) < 0.5, d - expm1_minus_x(-d, exp_d), 1.0 - exp_d)


@triton.jit
def kl_clamped(d, input_bound, output_bound, KIND: tl.constexpr, STRAIGHT_THROUGH: tl.constexpr):
    """(value, slope) under symmetric clamps of d and of the result (inf: none); straight through: k2's slope."""
    x = bounded(d, input_bound)
    raw = kl_value(x, KIND)
    value = bounded(raw, output_bound)
    if STRAIGHT_THROUGH:
        slope = x
    else:
        slope = tl.where(tl.abs(raw) <= output_bound, kl_slope(x, KIND), 0.0)
    return value, tl.where(tl.abs(d) <= input_bound, slope, 0.0)
