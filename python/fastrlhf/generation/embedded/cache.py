"""The key-value cache of all layers, and attention over it for one batch of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.paged_attention import empty_cache, paged_attention

if TYPE_CHECKING:
    from ...models.decoder import Attention, Decoder


class Cache:
    def __init__(self, model: Decoder, blocks: int) -> None:
        heads, dim = model.kv_shape
        self.layers = {
            layer.self_attn.layer: empty_cache(blocks, heads, dim, model.dtype, model.device) for layer in model.layers
        }

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Blocks (from, to)."""
        source, target = torch.tensor(pairs, dtype=torch.int64).unbind(1)
        for layer in self.layers.values():
            for cache in layer:
                cache[target] = cache[source]


class Paged:
    """The context of a forward over the cache: token i is at positions[i] of block-table row sequences[i].

    Rows of the batch past the tokens are padding and get zeros.
    """

    def __init__(self, cache: Cache, positions: Tensor, sequences: Tensor, block_table: Tensor, longest: int) -> None:
        self.cache, self.positions, self.sequences, self.block_table = cache, positions, sequences, block_table
        self.longest = longest

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Tensor:
        n, rows = self.positions.shape[0], q.shape[0]
        cos, sin = attention.rotary.upto(self.longest, q.device)
        out = paged_attention(
            q[:n], k[:n], v[:n], cos, sin, self.positions, self.sequences, self.block_table,
            *self.cache.layers[attention.layer], window=attention.window,
        ).view(n, -1)  # fmt: skip
        return out if n == rows else F.pad(out, (0, 0, 0, rows - n))
