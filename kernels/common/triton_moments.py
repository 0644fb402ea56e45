"""Masked count, mean and sum of squared deviations, merged as Chan et al. 1979: no sum of squares to cancel."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_reduction import get


@triton.jit
def tile_moments(x, m, n):
    """(mean, M2) in double of a tile whose weights m sum to n: deviations from the float mean, corrected for its rounding."""
    over = tl.where(n != 0, n, 1.0)
    mean = tl.sum(tl.where(m != 0, m * x, 0.0), 0) / over
    d = tl.where(m != 0, x - mean, 0.0)
    correction = tl.sum(m * d, 0).to(tl.float64) / over
    return mean.to(tl.float64) + correction, tl.sum(m * d * d, 0).to(tl.float64) - n * correction * correction


@triton.jit
def merged(n, mean, m2, n2, mean2, m2_2):
    """(mean, M2) of two sets; their counts add up."""
    total = n + n2
    share = tl.where(total != 0, n2 / tl.where(total != 0, total, 1.0), 0.0)
    delta = mean2 - mean
    return mean + delta * share, m2 + m2_2 + delta * delta * n * share


@triton.jit
def column_moments(partials, n_entry, ENTRIES: tl.constexpr, WIDTH: tl.constexpr):
    """Over a workspace's columns, weighted by entry n_entry: (sum, weighted mean, weighted squares about it) of each entry."""
    k = tl.arange(0, ENTRIES)[:, None]
    plain, weighted = tl.zeros([ENTRIES, WIDTH], tl.float64), tl.zeros([ENTRIES, WIDTH], tl.float64)
    count = tl.zeros([WIDTH], tl.float64)
    for first in range(0, tl.num_programs(0), WIDTH):
        columns = first + tl.arange(0, WIDTH)
        x, n = get(partials, k, columns[None, :]), get(partials, n_entry, columns)
        plain, weighted, count = plain + x, weighted + x * n[None, :], count + n
    total = tl.sum(count, 0)
    mean = tl.sum(weighted, 1) / tl.where(total != 0, total, 1.0)
    squares = tl.zeros([ENTRIES, WIDTH], tl.float64)
    for first in range(0, tl.num_programs(0), WIDTH):
        columns = first + tl.arange(0, WIDTH)
        d, n = get(partials, k, columns[None, :]) - mean[:, None], get(partials, n_entry, columns)
        squares += d * d * n[None, :]
    return tl.sum(plain, 1), mean, tl.sum(squares, 1)
