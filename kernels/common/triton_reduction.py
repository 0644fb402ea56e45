"""Many programs' sums as one: each writes a column of a workspace, and the one that finishes last adds the columns up in
their order. How token losses then become one number is kernels/common/reduction.h."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def is_last(counter):
    """Whether every other program has called this before, so that what they wrote is visible; leaves the counter at 0."""
    tl.debug_barrier()  # the ticket is taken by one thread; the others' stores come before it
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def put(partials, k, x):
    """x as entry k of this program's column of (entries, programs)."""
    tl.store(partials + k * tl.num_programs(0).to(tl.int64) + tl.program_id(0), x)


@triton.jit
def get(partials, k, columns):
    """Entries k of some columns, past any first-level cache; 0 for columns that do not exist."""
    programs = tl.num_programs(0)
    return tl.load(partials + k * programs.to(tl.int64) + columns, mask=columns < programs, other=0, cache_modifier=".cg")


@triton.jit
def total_of(partials, ENTRIES: tl.constexpr, WIDTH: tl.constexpr):
    """(ENTRIES) sums over the columns, in double."""
    k = tl.arange(0, ENTRIES)[:, None]
    total = tl.zeros([ENTRIES, WIDTH], tl.float64)
    for first in range(0, tl.num_programs(0), WIDTH):
        total += get(partials, k, (first + tl.arange(0, WIDTH))[None, :]).to(tl.float64)
    return tl.sum(total, 1)


@triton.jit
def largest_of(partials, k, WIDTH: tl.constexpr):
    """The largest of one entry over the columns."""
    best = tl.full([WIDTH], float("-inf"), tl.float32)
    for first in range(0, tl.num_programs(0), WIDTH):
        columns = first + tl.arange(0, WIDTH)
        best = tl.maximum(best, tl.where(columns < tl.num_programs(0), get(partials, k, columns), float("-inf")))
    return tl.max(best, 0)


@triton.jit
def sum_of(partials, k, WIDTH: tl.constexpr):
    """The sum of one entry over the columns, in double."""
    total = tl.zeros([WIDTH], tl.float64)
    for first in range(0, tl.num_programs(0), WIDTH):
        total += get(partials, k, first + tl.arange(0, WIDTH)).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def pick(values, k, wanted):
    """values[wanted] of a vector with indices k."""
    return tl.sum(tl.where(k == wanted, values, 0.0), 0)


@triton.jit
def row_factor(tokens, REDUCTION: tl.constexpr):
    """The part of a token's weight that its row decides: 1 / tokens for the mean in a row; 0 for a row without tokens."""
    over = tokens if REDUCTION == 2 else tokens * 0 + 1
    return tl.where(tokens != 0, 1 / tl.where(tokens != 0, over, 1.0), 0.0)


@triton.jit
def longest_row(cu_seqlens, rows, length, WIDTH: tl.constexpr):
    """T, or the longest segment of a pack."""
    if cu_seqlens is None:
        return length
    else:
        best = tl.zeros([WIDTH], tl.int32)
        for first in range(0, rows, WIDTH):
            row = first + tl.arange(0, WIDTH)
            end = tl.load(cu_seqlens + row + 1, mask=row < rows, other=0)
            best = tl.maximum(best, (end - tl.load(cu_seqlens + row, mask=row < rows, other=0)).to(tl.int32))
        return tl.max(best, 0)


@triton.jit
def global_share(tokens, sequences, denominator, cu_seqlens, rows, length, REDUCTION: tl.constexpr, POINTER: tl.constexpr):
    """1 over what the reduction divides by: the denominator where one is given, else its own count; 0 where nothing counts."""
    if denominator is not None:
        over = tl.load(denominator) if POINTER else tl.cast(denominator, tl.float64)
    elif REDUCTION == 0:
        over = tokens
    elif REDUCTION == 1:
        over = tokens * 0 + 1
    elif REDUCTION == 4:
        over = sequences * longest_row(cu_seqlens, rows, length, 256)
    else:
        over = sequences
    some = (over != 0) & (tokens != 0)
    return tl.where(some, 1 / tl.where(some, over, 1.0), 0.0)
