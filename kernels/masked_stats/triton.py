"""Masked moments, sums of rows and standardising, without a wait for the device: what depends on the moments reads them
there."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.launch import launch
from ..common.tiles import tile
from ..common.triton_moments import column_moments, merged, tile_moments
from ..common.triton_reduction import is_last, pick, put
from ..common.triton_tokens import (
    aligned,
    as_one_row,
    fold,
    known_multiple,
    lanes,
    load_mask,
    load_tokens,
    plain,
    row_bounds,
    row_shape,
    strides,
)

PROGRAMS = 1024
SHORT = 256  # tokens of a padded row up to which a program takes many
PART = 32768  # tokens of a padded row from which on several programs share it
_RUNTIME, _COLUMNS = ["rows", "length", "parts", "s_x", "s_mask"], ["c_x", "c_mask"]


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_COLUMNS)
def moments_kernel(
    x, mask, out, variance, counter, partials, rows, length, s_x, c_x, s_mask, c_mask,
    UNBIASED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(n, mean, M2) of a tile at a time, merged within a program and then, by the last one, over programs."""
    length = known_multiple(length, ALIGNED)
    s_x, s_mask = known_multiple(s_x, ALIGNED), known_multiple(s_mask, ALIGNED)
    row_tiles = tl.cdiv(length, BLOCK)
    lane = lanes(BLOCK)
    n, mean, m2 = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
    for i in range(tl.program_id(0), rows * row_tiles, tl.num_programs(0)):
        row, first = (i // row_tiles).to(tl.int64), i % row_tiles * BLOCK
        inside = lane < length - first
        m = load_mask(mask, row, first, s_mask, c_mask, lane, inside)
        tile_n = tl.sum(m, 0).to(tl.float64)
        tile_mean, tile_m2 = tile_moments(load_tokens(x, row, first, s_x, c_x, lane, inside), m, tile_n)
        mean, m2 = merged(n, mean, m2, tile_n, tile_mean, tile_m2)
        n += tile_n
    put(partials, 0, n)
    put(partials, 1, mean)
    put(partials, 2, m2)
    put(partials, 3, n * 0)
    if is_last(counter):
        k = tl.arange(0, 4)
        sums, means, squares = column_moments(partials, 0, 4, 128)
        n, m2 = pick(sums, k, 0), pick(sums, k, 2) + pick(squares, k, 1)
        tl.store(out, n)
        tl.store(out + 1, pick(means, k, 1))
        tl.store(out + 2, m2)
        if variance is not None:
            over = n - 1 if UNBIASED else n
            tl.store(variance, tl.where(over > 0, m2 / tl.where(over > 0, over, 1.0), 0.0).to(tl.float32))


def moments(
    x: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    variance: torch.Tensor | None,
    counter: torch.Tensor,
    *,
    unbiased: bool,
) -> None:
    """n, mean and M2 of all elements into `out` (3), in double; their variance where it is wanted."""
    x, mask = as_one_row(x, mask)
    rows, length = row_shape(x, None)
    choice = tile("masked_stats.moments", x, length)
    programs = min(max(rows * triton.cdiv(length, choice["BLOCK"]), 1), PROGRAMS)
    launch(
        moments_kernel, (programs,), x, plain(mask), out, variance, counter,
        torch.empty((4, programs), dtype=torch.float64, device=x.device), rows, length, *strides(x), *strides(mask),
        UNBIASED=unbiased, ALIGNED=aligned(length, x, mask), **choice,
    )  # fmt: skip


@triton.jit
def _sum_and_count(x, mask, row, start, begin, end, s_x, c_x, s_mask, c_mask, BLOCK: tl.constexpr):
    """Σ m x and Σ m over tokens begin to end of a row, in double."""
    lane = lanes(BLOCK)
    total, count = tl.zeros([BLOCK // 4], tl.float64), tl.zeros([BLOCK // 4], tl.float64)
    for first in range(begin, end, BLOCK):
        inside = lane < end - first
        m = load_mask(mask, row, start + first, s_mask, c_mask, lane, inside)
        value = load_tokens(x, row, start + first, s_x, c_x, lane, inside)
        total += fold(tl.where(m != 0, m * value, 0.0)).to(tl.float64)
        count += fold(m).to(tl.float64)
    return tl.sum(total, 0), tl.sum(count, 0)


@triton.jit
def _write_row(sums, counts, row, total, count, inside, AVERAGE: tl.constexpr):
    """One row's or several rows' results."""
    if AVERAGE:
        total = tl.where(count != 0, total / tl.where(count != 0, count, 1.0), 0.0)
    tl.store(sums + row, total.to(tl.float32), mask=inside)
    if counts is not None:
        tl.store(counts + row, count.to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_COLUMNS)
def row_sums_kernel(
    x, mask, cu_seqlens, sums, counts, length, s_x, c_x, s_mask, c_mask,
    AVERAGE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    s_x, s_mask = known_multiple(s_x, ALIGNED), known_multiple(s_mask, ALIGNED)
    start, size = row_bounds(row, cu_seqlens, known_multiple(length, ALIGNED))
    total, count = _sum_and_count(x, mask, row, start, 0, size, s_x, c_x, s_mask, c_mask, BLOCK)
    _write_row(sums, counts, row, total, count, row >= 0, AVERAGE)


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_COLUMNS)
def short_row_sums_kernel(
    x, mask, sums, counts, rows, length, s_x, c_x, s_mask, c_mask,
    AVERAGE: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Many rows a program, so that short ones, and columns of a matrix, are read as wide as long ones are."""
    s_x, s_mask = known_multiple(s_x, ALIGNED), known_multiple(s_mask, ALIGNED)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total, count = tl.zeros([ROWS, BLOCK], tl.float64), tl.zeros([ROWS, BLOCK], tl.float64)
    for first in range(0, length, BLOCK):
        t = first + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (t < length)[None, :]
        m = load_mask(mask, row[:, None], first, s_mask, c_mask, tl.arange(0, BLOCK).to(tl.int64)[None, :], inside)
        value = load_tokens(x, row[:, None], first, s_x, c_x, tl.arange(0, BLOCK).to(tl.int64)[None, :], inside)
        total += tl.where(m != 0, m * value, 0.0).to(tl.float64)
        count += m.to(tl.float64)
    _write_row(sums, counts, row, tl.sum(total, 1), tl.sum(count, 1), row < rows, AVERAGE)


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_COLUMNS)
def long_row_sums_kernel(
    x, mask, sums, counts, counter, partials, rows, length, parts, s_x, c_x, s_mask, c_mask,
    AVERAGE: tl.constexpr, ALIGNED: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Parts of rows; the last program adds them up, a few rows at a time."""
    length = known_multiple(length, ALIGNED)
    s_x, s_mask = known_multiple(s_x, ALIGNED), known_multiple(s_mask, ALIGNED)
    row, begin = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts * PART
    total, count = _sum_and_count(
        x, mask, row, row * 0, begin, tl.minimum(length, begin + PART), s_x, c_x, s_mask, c_mask, BLOCK
    )  # fmt: skip
    put(partials, 0, total)
    put(partials, 1, count)
    if is_last(counter):
        programs = tl.num_programs(0)
        for first in range(0, rows, 8):
            some = first + tl.arange(0, 8)
            totals, tallies = tl.zeros([8, 128], tl.float64), tl.zeros([8, 128], tl.float64)
            for first_part in range(0, parts, 128):
                part = (first_part + tl.arange(0, 128))[None, :]
                at, inside = some[:, None] * parts + part, (some < rows)[:, None] & (part < parts)
                totals += tl.load(partials + at, mask=inside, other=0, cache_modifier=".cg")
                tallies += tl.load(partials + programs + at, mask=inside, other=0, cache_modifier=".cg")
            _write_row(sums, counts, some, tl.sum(totals, 1), tl.sum(tallies, 1), some < rows, AVERAGE)


def row_sums(
    x: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    *,
    average: bool,
    sums: torch.Tensor,
    counts: torch.Tensor | None,
    counter: torch.Tensor,
) -> None:
    """Masked sums or means of rows, and their counts where they are wanted."""
    rows, length = row_shape(x, cu_seqlens)
    choice = tile("masked_stats.row_sums", x, length)
    if cu_seqlens is None and length <= SHORT:
        choice = tile("masked_stats.short_row_sums", x, length)
        launch(
            short_row_sums_kernel, (triton.cdiv(rows, choice["ROWS"]),), x, plain(mask), sums, counts, rows, length,
            *strides(x), *strides(mask), AVERAGE=average, ALIGNED=aligned(length, x, mask), **choice,
        )  # fmt: skip
        return
    if length < PART:
        launch(
            row_sums_kernel, (rows,), x, plain(mask), cu_seqlens, sums, counts, length, *strides(x), *strides(mask),
            AVERAGE=average, ALIGNED=aligned(length, x, mask), **choice,
        )  # fmt: skip
        return
    part = PART // 4
    parts = triton.cdiv(length, part)
    launch(
        long_row_sums_kernel, (rows * parts,), x, plain(mask), sums, counts, counter,
        torch.empty((2, rows * parts), dtype=torch.float64, device=x.device), rows, length, parts, *strides(x), *strides(mask),
        AVERAGE=average, ALIGNED=aligned(length, x, mask), PART=part, **choice,
    )  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_COLUMNS)
def standardize_kernel(
    x, mask, moments, out, length, eps, s_x, c_x, s_mask, c_mask,
    SHIFT_MEAN: tl.constexpr, UNBIASED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(x - mean) / √(var + eps), + mean unless the mean is shifted away; 0 where the mask is."""
    length = known_multiple(length, ALIGNED)
    s_x, s_mask = known_multiple(s_x, ALIGNED), known_multiple(s_mask, ALIGNED)
    row_tiles = tl.cdiv(length, BLOCK)
    row, first = (tl.program_id(0) // row_tiles).to(tl.int64), tl.program_id(0) % row_tiles * BLOCK
    lane = lanes(BLOCK)
    inside = lane < length - first
    n, mean, m2 = tl.load(moments), tl.load(moments + 1), tl.load(moments + 2)
    over = n - 1 if UNBIASED else n
    spread = tl.where(over > 0, m2 / tl.where(over > 0, over, 1.0), 0.0) + eps
    scale = tl.where(spread > 0, 1 / tl.sqrt(tl.where(spread > 0, spread, 1.0)), 0.0).to(tl.float32)
    shift = mean.to(tl.float32)
    value = (load_tokens(x, row, first, s_x, c_x, lane, inside) - shift) * scale
    if not SHIFT_MEAN:
        value += shift
    if mask is not None:
        value = tl.where(load_mask(mask, row, first, s_mask, c_mask, lane, inside) != 0, value, 0.0)
    tl.store(out + row * length + first + lane, value, mask=inside)


def standardize(
    x: torch.Tensor,
    mask: torch.Tensor | None,
    moments: torch.Tensor,
    *,
    shift_mean: bool,
    unbiased: bool,
    eps: float,
    out: torch.Tensor,
) -> None:
    """x by the moments that `moments` left on the device."""
    x, mask = as_one_row(x, mask)
    rows, length = row_shape(x, None)
    choice = tile("masked_stats.standardize", x, length)
    launch(
        standardize_kernel, (rows * triton.cdiv(length, choice["BLOCK"]),), x, plain(mask), moments, out, length, float(eps),
        *strides(x), *strides(mask), SHIFT_MEAN=shift_mean, UNBIASED=unbiased, ALIGNED=aligned(length, x, mask),
        **choice,
    )  # fmt: skip
