"""Attention of new tokens over a key-value cache in blocks: one step of generation, or a chunk of a prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.paged_attention import reference
from . import checks
from .backend import DTYPES, choose, empty, extension, threads, triton_kernels

BLOCK = reference.BLOCK


def empty_cache(blocks: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The caches of one layer: keys (blocks, kv_heads, dim, BLOCK), values (blocks, kv_heads, BLOCK, dim padded to 16)."""
    keys = torch.zeros(blocks, kv_heads, dim, BLOCK, dtype=dtype, device=device)
    return keys, torch.zeros(blocks, kv_heads, BLOCK, -(-dim // 16) * 16, dtype=dtype, device=device)


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, sequences: Tensor, block_table: Tensor,
    k_cache: Tensor, v_cache: Tensor, *, scale: float | None = None, window: int | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Turn queries and keys by their positions, append keys and values to the cache, and attend.

    Token t, at position p = positions[t] of the sequence whose blocks are block_table[sequences[t]], sees the positions
    max(0, p - window + 1) … p: softmax(q kᵀ · scale) v. Those before must be in the cache or in this call. No gradient.
    A token's result does not depend on what else is in the call.

    Args:
        q: (n, heads, D), last two dimensions contiguous; float32, bfloat16 or float16.  k, v: (n, kv_heads, D), same dtype.
        cos, sin: (positions, D / 2), float32, contiguous: of the rotary angles.
        positions, sequences: (n), int64. The tokens of a sequence side by side, in order.
        block_table: (rows, width), int32: where positions BLOCK · i … of a sequence are.
        k_cache, v_cache: of `empty_cache`, q's dtype; written in place.
        scale: None is 1 / √D.
        window: >= 1; None sees all.
        backend: "triton", "cpu" or "reference"; None chooses.

    Returns:
        (n, heads, D), q's dtype.

    Raises:
        TypeError, ValueError: dtype, shape or device that do not fit.
        IndexError: a sequence, position or block out of range (cpu).

    Source: Kwon et al. 2023, PagedAttention.
    """
    checks.tensor("q", q, (torch.float32, torch.bfloat16, torch.float16))
    n, heads, dim = q.shape
    kv_heads, width = k.shape[1], block_table.shape[1]
    if k.shape != (n, kv_heads, dim) or v.shape != k.shape or heads % kv_heads:
        raise ValueError(f"k, v: expected shape ({n}, a divisor of {heads}, {dim}), got {tuple(k.shape)} and {tuple(v.shape)}")
    if k.dtype != q.dtype or v.dtype != q.dtype or k_cache.dtype != q.dtype or v_cache.dtype != q.dtype:
        raise TypeError(
            f"k, v, k_cache, v_cache: expected {q.dtype}, as q, got {k.dtype}, {v.dtype}, {k_cache.dtype}, {v_cache.dtype}"
        )
    blocks, padded = k_cache.shape[0], -(-dim // 16) * 16
    if k_cache.shape != (blocks, kv_heads, dim, BLOCK) or v_cache.shape != (blocks, kv_heads, BLOCK, padded):
        raise ValueError(
            f"k_cache, v_cache: expected (blocks, {kv_heads}, {dim}, {BLOCK}) and (blocks, {kv_heads}, {BLOCK}, {padded}), "
            f"got {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        )
    if positions.shape != (n,) or sequences.shape != (n,) or positions.dtype != torch.int64 or sequences.dtype != torch.int64:
        raise ValueError(
            f"positions, sequences: expected int64 ({n},), got {tuple(positions.shape)} and {tuple(sequences.shape)}"
        )
    if cos.dtype != torch.float32 or sin.dtype != torch.float32 or cos.shape != sin.shape or cos.shape[1] != dim // 2:
        raise ValueError(f"cos, sin: expected float32 (positions, {dim // 2}), got {tuple(cos.shape)} and {tuple(sin.shape)}")
    if block_table.dtype != torch.int32:
        raise TypeError(f"block_table: expected torch.int32, got {block_table.dtype}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected >= 1, got {window}")
    scale = dim**-0.5 if scale is None else float(scale)
    backend = choose("paged_attention", q, backend)
    if backend == "reference":
        return reference.paged_attention(
            q, k, v, cos, sin, positions, sequences, block_table, k_cache, v_cache, scale=scale, window=window
        )
    q, k, v = (t if t.stride()[1:] == (dim, 1) else t.contiguous() for t in (q, k, v))
    flat = (positions, sequences, block_table, cos, sin, k_cache, v_cache)
    if not all(t.is_contiguous() for t in flat):
        raise ValueError("positions, sequences, block_table, cos, sin and the caches must be contiguous")
    out = empty((n, heads, dim), q.dtype, q)
    if backend == "triton":
        triton_kernels("paged_attention").paged_attention(
            q, k, v, cos, sin, positions, sequences, block_table, k_cache, v_cache, scale=scale, window=window, out=out
        )
        return out
    extension().paged_attention(
        DTYPES[q.dtype], (n, heads, kv_heads, dim, padded, block_table.shape[0], width, blocks, cos.shape[0]),
        (q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0)), cos.data_ptr(), sin.data_ptr(),
        positions.data_ptr(), sequences.data_ptr(), block_table.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), scale,
        window or 0, out.data_ptr(), threads(),
    )  # fmt: skip
    return out
