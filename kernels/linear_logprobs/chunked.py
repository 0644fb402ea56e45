"""Any GPU, or any device with torch's matrix product: tiles of logits in a workspace, folded by the kernels of `logprobs`.

A tile is a part of the vocabulary: what the `logprobs` kernels know as a rank's shard of it. Forward leaves each tile's partial
statistics; backward turns a tile into its gradient in place, which two more products consume. The tiles of a call depend on its
sizes alone, but what torch's products round may depend on how many rows there are.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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
    """As wide as high where the workspace is full. The width depends on the vocabulary and the workspace alone: a row's
    statistics are merged in the same parts, whatever rows come with it."""
    elements = max(workspace_bytes // itemsize, 1)
    width = min(vocab, max(SMALLEST, math.isqrt(elements) // 128 * 128))
    return Tiles(rows, vocab, max(1, min(rows, elements // width)), width)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b, or `out` (float32) += a @ b in place, summed and left in float32. On a GPU halves multiply at the speed of halves;
    float32 with bfloat16 is two such products, of the float's first 8 bits and its next 8: within 2^-17 of it. Never TF32,
    and no autocast."""
    with _exactly(a.device):
        for left, right in _terms(a, b):
            wide: dict[str, Any] = {} if left.dtype == torch.float32 else {"out_dtype": torch.float32}
            if out is None:
                out = torch.mm(left, right, **wide)
            else:
                torch.addmm(out, left, right, **wide, out=out)
    assert out is not None
    return out


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, which takes room of out's size where out is not float32."""
    if out.dtype == torch.float32:
        product(a, b, out)
    else:
        out += product(a, b)


def _terms(a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The products that a @ b is the sum of."""
    if a.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):
        if a.dtype == torch.float32 and b.dtype == torch.bfloat16:
            high = a.bfloat16()
            return [(high, b), ((a - high).bfloat16(), b)]
        if a.dtype != torch.float32 and a.dtype == b.dtype:
            return [(a, b)]
    return [(a.float(), b.float())]


@contextlib.contextmanager
def _exactly(device: torch.device) -> Iterator[None]:
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, tile: Tile) -> Tensor:
    out = product(hidden[tile.rows], weight[tile.columns].T)
    return out if bias is None else out.add_(bias[tile.columns].float())


def forward(
    logits: Callable[[Tile], Tensor], cut: Tiles, partials: Tensor, fold: Callable[[Tensor, Tile, Tensor], None]
) -> None:
    """partials (tiles across, rows, 3 + labels): fold(logits, tile, partials of the tile) writes them."""
    for tile in cut:
        fold(logits(tile), tile, partials[tile.columns.start // cut.width, tile.rows])


def backward(
    logits: Callable[[Tile], Tensor],
    hidden: Tensor,
    weight: Tensor,
    cut: Tiles,
    differentiate: Callable[[Tensor, Tile], None],
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    round_to: torch.dtype = torch.float32,
) -> None:
    """Adds to sums (rows, H), (V, H) and (V), float32 but for (V, H); `logits` gives those of the forward, to the bit, and
    differentiate(logits, tile) turns them into their gradient in place. `round_to`: what that is rounded to before it is
    multiplied: bfloat16 halves the work on a GPU."""
    for tile in cut:
        x = logits(tile)
        differentiate(x, tile)
        if grad_bias is not None:
            grad_bias[tile.columns] += x.sum(0)
        x = x.to(round_to)
        if grad_hidden is not None:
            product(x, weight[tile.columns], grad_hidden[tile.rows])
        if grad_weight is not None:
            add_product(grad_weight[tile.columns], x.T, hidden[tile.rows])
