"""Any GPU, or any device with torch's matrix product: tiles of logits in a workspace, folded by the kernels of `logprobs`.

A tile is a part of the vocabulary: what the `logprobs` kernels know as a rank's shard of it. Forward leaves each tile's partial
statistics; backward turns a tile into its gradient in place, which two more products consume. The tiles of a call depend on its
sizes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST = 1024  # columns of a tile: below that a product reads more than it computes


class Tile(NamedTuple):
    """Rows and columns of the logits."""

    rows: slice
    columns: slice


class Tiles(NamedTuple):
    """A cut of (rows, vocab): `height` rows by `width` columns each."""

    rows: int
    vocab: int
    height: int
    width: int

    @property
    def across(self) -> int:
        """Tiles of one row."""
        return -(-self.vocab // self.width)

    def __iter__(self) -> Iterator[Tile]:  # type: ignore[override]
        for top in range(0, self.rows, self.height):
            for left in range(0, self.vocab, self.width):
                yield Tile(slice(top, min(top + self.height, self.rows)), slice(left, min(left + self.width, self.vocab)))


def tiles(rows: int, vocab: int, workspace_bytes: int, itemsize: int = 4) -> Tiles:
    """As wide as the workspace lets all rows be, but for `SMALLEST`; then as high."""
    elements = max(workspace_bytes // itemsize, 1)
    width = min(vocab, max(SMALLEST, elements // max(rows, 1) // 128 * 128))
    return Tiles(rows, vocab, max(1, min(rows, elements // width)), width)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b summed and left in float32. On a GPU halves multiply at the speed of halves; float32 with bfloat16 is two such
    products, of the float's first 8 bits and its next 8: within 2^-17 of it. Never TF32."""
    if a.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):
        if a.dtype == torch.float32 and b.dtype == torch.bfloat16:
            high = a.bfloat16()
            return product(high, b).add_(product((a - high).bfloat16(), b))
        if a.dtype != torch.float32 and a.dtype == b.dtype:
            return torch.mm(a, b, out_dtype=torch.float32)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        return a.float() @ b.float()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, tile: Tile) -> Tensor:
    out = product(hidden[tile.rows], weight[tile.columns].T)
    return out if bias is None else out.add_(bias[tile.columns].float())


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cut: Tiles,
    partials: Tensor,
    fold: Callable[[Tensor, Tile, Tensor], None],
) -> None:
    """partials (tiles across, rows, 3 + labels): fold(logits, tile, partials of the tile) writes them."""
    for tile in cut:
        fold(logits(hidden, weight, bias, tile), tile, partials[tile.columns.start // cut.width, tile.rows])


def backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cut: Tiles,
    differentiate: Callable[[Tensor, Tile], None],
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    stored: Tensor | None = None,
    round_to: torch.dtype = torch.float32,
) -> None:
    """Adds to float32 (rows, H), (V, H) and (V) sums; differentiate(logits, tile) turns logits into their gradient in place.
    `stored`: the logits (rows, V), if they are still there. `round_to`: what their gradient is rounded to before it is
    multiplied: bfloat16 halves the work on a GPU."""
    for tile in cut:
        x = logits(hidden, weight, bias, tile) if stored is None else stored[tile.rows, tile.columns]
        differentiate(x, tile)
        if grad_bias is not None:
            grad_bias[tile.columns] += x.sum(0)
        x = x.to(round_to)
        if grad_hidden is not None:
            grad_hidden[tile.rows] += product(x, weight[tile.columns])
        if grad_weight is not None:
            grad_weight[tile.columns] += product(x.T, hidden[tile.rows])
