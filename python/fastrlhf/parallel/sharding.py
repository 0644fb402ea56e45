"""Where the elements of a parameter lie in the whole tensor of which it is a shard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Chunk(NamedTuple):
    """A box of a shard and where it lies in the whole tensor: `local`, `offsets` and `sizes`, one number a dimension."""

    local: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def of(self, shard: Tensor) -> Tensor:
        """The box of a shard, a view."""
        for dim, (start, size) in enumerate(zip(self.local, self.sizes, strict=True)):
            shard = shard.narrow(dim, start, size)
        return shard


class Piece(NamedTuple):
    """Rows (or columns) [local, local + length) of a shard are [whole, whole + length) of the whole tensor."""

    local: int
    whole: int
    length: int


@dataclass(frozen=True)
class Sharding:
    """`shape` of the whole tensor; `dim`, along which it is cut into `pieces`, None where every tp rank holds all of it.
    `partial`: a rank's gradient is only its part of a sum over tp. `tied`: the first and the last stage of a pipeline hold
    it and each has a part of its gradient; in the last it is `shared`, and the first counts and writes it."""

    shape: tuple[int, ...]
    dim: int | None = None
    pieces: tuple[Piece, ...] = ()
    partial: bool = False
    tied: bool = False
    shared: bool = False

    def chunks(self, shard: Tensor, first: int = 0, last: int | None = None) -> Iterator[Chunk]:
        """The boxes of rows [first, last) of a shard of this kind; their local rows are counted from `first`."""
        last = shard.shape[0] if last is None else last
        if shard.dim() == 0:
            yield Chunk((), (), ())
            return
        rest = tuple(shard.shape[1:])
        zeros = (0,) * len(rest)
        if self.dim == 0:
            for piece in self.pieces:
                low, high = max(first, piece.local), min(last, piece.local + piece.length)
                if low < high:
                    yield Chunk((low - first, *zeros), (piece.whole + low - piece.local, *zeros), (high - low, *rest))
        elif last > first:
            offsets = list(zeros)
            if self.dim is not None:
                offsets[self.dim - 1] = self.pieces[0].whole
            yield Chunk((0, *zeros), (first, *offsets), (last - first, *rest))


def sharding_of(parameter: Tensor) -> Sharding:
    """Of a parameter; one that says nothing is whole on every tp rank."""
    found = getattr(parameter, "sharding", None)
    return found if isinstance(found, Sharding) else Sharding(tuple(parameter.shape))


def even(parameter: Tensor, dim: int, rank: int, size: int) -> Sharding:
    """The rank-th of `size` equal shards along a dimension."""
    shape, width = list(parameter.shape), parameter.shape[dim]
    shape[dim] *= size
    return Sharding(tuple(shape), dim, (Piece(0, rank * width, width),))


def mark(parameter: Tensor, sharding: Sharding) -> None:
    """Say where a parameter lies."""
    setattr(parameter, "sharding", sharding)  # noqa: B010  # torch's types know no such attribute


@dataclass(frozen=True)
class Placement:
    """Where a tensor of a checkpoint lies in the whole one of which it holds `chunks`. Of several processes that hold the
    same, one `writes` it."""

    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    writes: bool


def placed(tensor: Tensor, placement: Placement) -> Tensor:
    """An alias of a tensor that knows where it lies."""
    alias = tensor.detach()
    setattr(alias, "placement", placement)  # noqa: B010
    return alias


def placement_of(tensor: Tensor) -> Placement | None:
    """None where a tensor is whole and the same in every process."""
    return getattr(tensor, "placement", None)
