"""Rows of (..., V) tensors and the tiles they are read in."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .tiles import tile


def rows_of(t: Tensor) -> tuple[int, int, int]:
    """(inner, outer stride, inner stride): row r of 1 to 3 dimensions begins at r // inner · outer + r % inner · inner."""
    if t.dim() == 3:
        return t.shape[1], t.stride(0), t.stride(1)
    return (t.shape[0], 0, t.stride(0)) if t.dim() == 2 else (1, 0, 0)


def row_tile(kernel: str, *tensors: Tensor) -> dict[str, int]:
    """The constants of `tile` for these tensors' rows, the number of lanes, and the vector that a lane reads."""
    chosen = tile(kernel, tensors[0], tensors[0].shape[-1])
    return chosen | {"LANES": 32 * chosen["num_warps"], "VECTOR": _vector_width(*tensors)}


def _vector_width(*tensors: Tensor) -> int:
    """Elements of a 16-byte access, or 1 where rows do not lie on 16 bytes; it depends on V, so that a row's bits do
    not depend on whether other rows are there."""
    size = tensors[0].element_size()
    for t in tensors:
        if t.data_ptr() % 16 or t.shape[-1] * size % 16 or any(s * size % 16 for s in t.stride()[:-1]):
            return 1
    return 16 // size


@triton.jit
def row_start(row, inner, outer_stride, inner_stride, VECTOR: tl.constexpr):
    """Where row `row` (int32) begins, in elements."""
    outer, inside = row // inner, row % inner
    return tl.multiple_of(outer.to(tl.int64) * outer_stride + inside.to(tl.int64) * inner_stride, VECTOR)


@triton.jit
def tile_columns(BLOCK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Columns 0 to BLOCK as (LANES, BLOCK / LANES / VECTOR, VECTOR). With a thread a lane, lanes' vectors lie side by side,
    and reductions over axes 1 and 2 stay in a thread's registers (Triton gives threads to axis 0 before axis 1)."""
    lane = tl.arange(0, LANES)[:, None, None]
    step = tl.arange(0, BLOCK // (LANES * VECTOR))[None, :, None]
    return (step * LANES + lane) * VECTOR + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def load_tile(row, columns, vocab, TAIL: tl.constexpr):
    """A tile of a row as float32; -inf past its end, which only the last tile reaches."""
    if TAIL:
        x = tl.load(row + columns, mask=columns < vocab, other=float("-inf"), eviction_policy="evict_first")
    else:
        x = tl.load(row + columns, eviction_policy="evict_first")
    return x.to(tl.float32)


@triton.jit
def store_tile(row, columns, x, vocab, TAIL: tl.constexpr):
    """A float32 tile into a row, in the row's dtype."""
    x = x.to(row.dtype.element_ty)
    if TAIL:
        tl.store(row + columns, x, mask=columns < vocab)
    else:
        tl.store(row + columns, x)


@triton.jit
def store_zeros(row, begin, end, BLOCK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Zeros in the columns [begin, end) of a row; `begin` is a multiple of BLOCK."""
    columns = tile_columns(BLOCK, LANES, VECTOR)
    nothing = tl.zeros((LANES, BLOCK // (LANES * VECTOR), VECTOR), tl.float32)
    full = end // BLOCK * BLOCK
    for at in range(begin, full, BLOCK):
        store_tile(row, at + columns, nothing, end, False)
    if full < end:
        store_tile(row, full + columns, nothing, end, True)
