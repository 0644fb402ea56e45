"""Attention over the cache in blocks: one launch turns keys and appends, one turns queries and attends, a program for each
token and key-value head. A token's tiles begin at multiples of their width, whatever else is in the call."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.launch import launch

_RUNTIME = ["s_q", "s_k", "s_v", "width", "dim", "padded", "window"]


@triton.jit
def _turned(x, cos, sin, i, inside, half):
    """Both halves of rows of `2 half`, turned; x points at the first elements, cos and sin are of the token's position."""
    a = tl.load(x + i, mask=inside, other=0).to(tl.float32)
    b = tl.load(x + half + i, mask=inside, other=0).to(tl.float32)
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def _product(a, b):
    """a in float32 times b as the cache holds it, on the tensor cores: a's first bits, and what they leave."""
    if b.dtype == tl.float32:
        return tl.dot(a, b, input_precision="tf32x3")
    high = a.to(b.dtype)
    low = (a - high.to(tl.float32)).to(b.dtype)
    return tl.dot(high, b) + tl.dot(low, b)


@triton.jit(do_not_specialize=_RUNTIME)
def _append(
    k, v, cos, sin, positions, sequences, table, k_cache, v_cache, s_k, s_v, width, dim, padded,
    KV_HEADS: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions + token)
    block = tl.load(table + tl.load(sequences + token) * width + position // BLOCK).to(tl.int64) * KV_HEADS + head
    slot, half = position % BLOCK, dim // 2
    i = tl.arange(0, HALF)
    c = tl.load(cos + position * half + i, mask=i < half, other=0)
    s = tl.load(sin + position * half + i, mask=i < half, other=0)
    a, b = _turned(k + token * s_k + head * dim, c, s, i, i < half, half)
    to = k_cache + block * dim * BLOCK + slot
    tl.store(to + i * BLOCK, a, mask=i < half)
    tl.store(to + (half + i) * BLOCK, b, mask=i < half)
    j = tl.arange(0, WIDE)
    value = tl.load(v + token * s_v + head * dim + j, mask=j < dim)
    tl.store(v_cache + (block * BLOCK + slot) * padded + j, value, mask=j < dim)


@triton.jit(do_not_specialize=_RUNTIME)
def _attend(
    q, cos, sin, positions, sequences, table, k_cache, v_cache, out, s_q, width, dim, padded, window, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
    WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions + token)
    blocks = table + tl.load(sequences + token) * width
    half = dim // 2
    r, i, j = tl.arange(0, ROWS), tl.arange(0, HALF), tl.arange(0, WIDE)
    c = tl.load(cos + position * half + i, mask=i < half, other=0)
    s = tl.load(sin + position * half + i, mask=i < half, other=0)
    rows = (head * GROUP + r[:, None]) * dim
    inside = (r < GROUP)[:, None] & (i < half)[None, :]
    a, b = _turned(q + token * s_q + rows, c[None, :], s[None, :], i[None, :], inside, half)
    a, b = a * scale, b * scale
    first = tl.maximum(position - window + 1, 0)
    high = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mean = tl.zeros((ROWS, WIDE), tl.float32)
    for start in range(first // TILE * TILE, position + 1, TILE):
        at = start + tl.arange(0, TILE)
        sees = (at >= first) & (at <= position)
        block = tl.load(blocks + at // BLOCK, mask=sees, other=0).to(tl.int64) * KV_HEADS + head
        keys = k_cache + (block * dim * BLOCK + at % BLOCK)[None, :] + i[:, None] * BLOCK
        seen = (i < half)[:, None] & sees[None, :]
        x = _product(a, tl.load(keys, mask=seen, other=0)) + _product(b, tl.load(keys + half * BLOCK, mask=seen, other=0))
        x = tl.where(sees[None, :], x, float("-inf"))
        higher = tl.maximum(high, tl.max(x, 1))  # finite: every tile holds a position that is seen
        e, shrink = tl.exp(x - higher[:, None]), tl.exp(high - higher)
        values = v_cache + ((block * BLOCK + at % BLOCK) * padded)[:, None] + j[None, :]
        y = tl.load(values, mask=sees[:, None] & (j < dim)[None, :], other=0)
        mean = mean * shrink[:, None] + _product(e, y)
        total = total * shrink + tl.sum(e, 1)
        high = higher
    to = out + (token * KV_HEADS * GROUP * dim) + rows + j[None, :]
    tl.store(to, mean / total[:, None], mask=(r < GROUP)[:, None] & (j < dim)[None, :])


def paged_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor,
    sequences: torch.Tensor, block_table: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *, scale: float,
    window: int | None, out: torch.Tensor,
) -> None:  # fmt: skip
    """Append all keys and values, then attend. Rows of q, k and v are contiguous, and so is everything else."""
    (tokens, heads, dim), kv_heads, block = q.shape, k.shape[1], k_cache.shape[-1]
    width, padded = block_table.shape[1], v_cache.shape[-1]
    common = {
        "KV_HEADS": kv_heads, "BLOCK": block, "HALF": max(16, triton.next_power_of_2(dim // 2)),
        "WIDE": max(16, triton.next_power_of_2(dim)),
    }  # fmt: skip
    grid = (tokens, kv_heads)
    launch(
        _append, grid, k, v, cos, sin, positions, sequences, block_table, k_cache, v_cache, k.stride(0), v.stride(0), width,
        dim, padded, **common, num_warps=1,
    )  # fmt: skip
    group = heads // kv_heads
    tile = 64 if dim * k.element_size() <= 128 else 32  # positions, whole blocks; more are kept in memory instead of registers
    launch(
        _attend, grid, q, cos, sin, positions, sequences, block_table, k_cache, v_cache, out, q.stride(0), width, dim, padded,
        window or 2**31 - 1, float(scale), **common, GROUP=group, ROWS=max(16, triton.next_power_of_2(group)), TILE=tile,
        num_warps=4,
    )  # fmt: skip
