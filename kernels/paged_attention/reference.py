"""Attention of new tokens over a cache in blocks, in plain PyTorch: the definition. Runs on any device."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 16  # positions in a block


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, sequences: Tensor, block_table: Tensor,
    k_cache: Tensor, v_cache: Tensor, *, scale: float, window: int | None,
) -> Tensor:  # fmt: skip
    """Write the turned keys and the values to the caches, then softmax(q kᵀ · scale) v over what each token sees."""
    heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[2]
    c, s = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    blocks, slots = block_table[sequences, positions // BLOCK].long(), positions % BLOCK
    k_cache[blocks, :, :, slots] = _turn(k, c, s).to(k_cache.dtype)
    v_cache[blocks, :, slots, :dim] = v.to(v_cache.dtype)

    width = block_table.shape[1] * BLOCK
    tables = block_table[sequences].long().clamp(min=0)  # (n, blocks)
    keys = k_cache[tables].permute(0, 2, 1, 4, 3).reshape(-1, kv_heads, width, dim).float()
    values = v_cache[tables][..., :dim].transpose(1, 2).reshape(-1, kv_heads, width, dim).float()
    rows = (_turn(q, c, s) * scale).view(-1, kv_heads, heads // kv_heads, dim)
    scores = rows @ keys.transpose(-1, -2)
    at = torch.arange(width, device=q.device)
    sees = at <= positions.unsqueeze(1)
    if window is not None:
        sees &= at > (positions - window).unsqueeze(1)
    weights = scores.masked_fill(~sees[:, None, None], -torch.inf).softmax(-1)
    values = values.masked_fill(~sees[:, None, :, None], 0)  # a block not yet written may hold anything
    return (weights @ values).reshape(-1, heads, dim).to(q.dtype)
