"""The rows of the token-level Triton kernels: (B, T) with any strides, the segments of a pack, or (T) as one row.

What varies from call to call compiles nothing anew: lengths and row strides are not specialised but for one flag, ALIGNED;
of a column stride only whether it is 1. So a call has two variants by its lengths, ALIGNED and not."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def lanes(BLOCK: tl.constexpr):
    """0 ... BLOCK - 1, four to a thread: one layout for all types, where a mask of bytes would ask for sixteen."""
    return tl.max_contiguous(tl.arange(0, BLOCK), 4)


@triton.jit
def fold(x):
    """Sums of four neighbours, which one thread holds: what is left is for the end of a loop."""
    return tl.sum(tl.reshape(x, [x.shape[0] // 4, 4]), 1)


@triton.jit
def fold_max(x):
    return tl.max(tl.reshape(x, [x.shape[0] // 4, 4]), 1)


@triton.jit
def known_multiple(length, ALIGNED: tl.constexpr):
    """length; with ALIGNED, one that the compiler knows to be a multiple of 16, so that accesses need no mask a token."""
    return length // 16 * 16 if ALIGNED else length


@triton.jit
def row_bounds(row, cu_seqlens, length):
    """(first token in the pack, number of tokens) of an int64 row; a padded row starts at 0 of itself."""
    if cu_seqlens is None:
        start = row * 0
        size = length
    else:
        start = tl.load(cu_seqlens + row)
        size = (tl.load(cu_seqlens + row + 1) - start).to(tl.int32)
    return start, size


@triton.jit
def load_tokens(x, row, at, row_stride, col_stride, lane, inside):
    """Tokens at + lane of an int64 row as float32, 0 outside. Packs: row strides are 0, `at` counts from the pack's start."""
    column = at + lane
    if not isinstance(col_stride, tl.constexpr):  # not 1
        column = column.to(tl.int64) * col_stride
    return tl.load(x + row * row_stride + column, mask=inside, other=0).to(tl.float32)


@triton.jit
def load_mask(mask, row, at, row_stride, col_stride, lane, inside):
    """The mask as weights: ones where there is none, 0 outside."""
    if mask is None:
        return tl.where(inside, 1.0, 0.0)
    else:
        return load_tokens(mask, row, at, row_stride, col_stride, lane, inside)


def plain(t: torch.Tensor | None) -> torch.Tensor | None:
    """Bool as bytes, so that a mask's two one-byte types are one kernel."""
    return t.view(torch.uint8) if t is not None and t.dtype == torch.bool else t


def aligned(length: int, *tensors: torch.Tensor | None) -> bool:
    """ALIGNED of a launch: the length and the row strides are multiples of 16."""
    return length > 0 and length % 16 == 0 and not any(t is not None and t.dim() == 2 and t.stride(0) % 16 for t in tensors)


def strides(t: torch.Tensor | None) -> tuple[int, int]:
    """(row stride, column stride) for `load_tokens`."""
    if t is None:
        return 0, 0
    return (t.stride(0), t.stride(1)) if t.dim() == 2 else (0, t.stride(0))


def row_shape(t: torch.Tensor, cu_seqlens: torch.Tensor | None) -> tuple[int, int]:
    """(rows, tokens of each); the segments of a pack have lengths of their own, and 0 stands here."""
    if cu_seqlens is not None:
        return cu_seqlens.shape[0] - 1, 0
    return (t.shape[0], t.shape[1]) if t.dim() == 2 else (1, t.shape[0])


def as_one_row(t: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A matrix and its mask as one row where that takes no copy, for ops to which rows mean nothing: no short tiles."""
    if t.dim() == 2 and t.is_contiguous() and (mask is None or mask.is_contiguous()):
        return t.view(-1), None if mask is None else mask.view(-1)
    return t, mask
