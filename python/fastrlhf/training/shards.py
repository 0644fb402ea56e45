"""Gradients and optimizer state shared among the data-parallel processes (ZeRO-1, Rajbhandari et al. 2020).

Every process holds the weights of its tp and pp place. Of each parameter the dp rank r keeps the float32 weights and the two
moments of rows [r · k, (r + 1) · k), k = ⌈rows / dp⌉, and steps these; the rows of the others come back by an all-gather.
With one process the slice is the parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..parallel import ParallelGroups
from ..parallel.collectives import all_gather_single, reduce_scatter_single, summed
from ..parallel.groups import Axis
from ..parallel.sharding import Chunk, Placement, placed, sharding_of

BUCKET = 50_000_000
"""Elements of one reduce-scatter or all-gather."""


class Slice:
    """A parameter and the rows of it that this dp rank steps."""

    def __init__(self, parameter: nn.Parameter, groups: ParallelGroups) -> None:
        self.parameter, self.sharding, dp = parameter, sharding_of(parameter), groups.dp
        count = parameter.shape[0]
        self.rows = -(-count // dp.size)
        self.first = min(dp.rank * self.rows, count)
        self.last = min(self.first + self.rows, count)
        self.width = parameter[0].numel()
        # of the ranks that hold the same rows, who counts their gradient's norm and writes them
        self.counts = not self.sharding.shared and (self.sharding.dim is not None or groups.tp.first)
        held = parameter if dp.size == 1 else nn.Parameter(parameter.data[self.first : self.last])
        self.weights = held if held.dtype == torch.float32 else nn.Parameter(held.detach().float())

    @property
    def empty(self) -> bool:
        return self.last == self.first

    def placement(self) -> Placement:
        """Of the slice in the whole tensor."""
        chunks = tuple(self.sharding.chunks(self.parameter, self.first, self.last))
        return Placement(self.sharding.shape, chunks, self.counts)


def weights_of(parameters: Mapping[str, nn.Parameter], groups: ParallelGroups) -> dict[str, Tensor]:
    """Parameters for a checkpoint: each says where it lies."""
    if groups.world.size == 1:
        return dict(parameters)
    out = {}
    for name, p in parameters.items():
        sharding = sharding_of(p)
        writes = groups.dp.first and not sharding.shared and (sharding.dim is not None or groups.tp.first)
        out[name] = placed(p, Placement(sharding.shape, tuple(sharding.chunks(p)), writes))
    return out


def scalar(value: Tensor, groups: ParallelGroups, writes: bool) -> Tensor:
    """A number of a parameter, such as its count of steps, for a checkpoint."""
    return placed(value.view(1), Placement((1,), (Chunk((0,), (0,), (1,)),), writes and groups.dp.first))


def add_partial(grads: Sequence[Tensor], axis: Axis) -> None:
    """Sum gradients over an axis, in place, in one message."""
    if axis.size == 1 or not grads:
        return
    flat = summed(torch.cat([g.reshape(-1) for g in grads]), axis)
    for g, total in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        g.copy_(total.view_as(g))


def scatter(slices: Sequence[Slice], grads: Sequence[Tensor], axis: Axis) -> list[Tensor]:
    """Each slice's rows of the sum of the gradients over dp."""
    if axis.size == 1:
        return list(grads)
    out: list[Tensor] = []
    for part, own in _buckets(slices, grads):
        sizes = [s.rows * s.width for s in part]
        packed = own[0].new_zeros(axis.size, sum(sizes))
        for s, g, column in zip(part, own, packed.split(sizes, 1), strict=True):
            flat = g.reshape(-1)
            for r in range(axis.size):
                rows = flat[r * s.rows * s.width : (r + 1) * s.rows * s.width]
                column[r, : rows.numel()] = rows
        mine = packed.new_empty(sum(sizes))
        reduce_scatter_single(mine, packed.view(-1), group=axis.group)
        for s, flat in zip(part, mine.split(sizes), strict=True):
            count = s.last - s.first
            out.append(flat[: count * s.width].view(count, *s.parameter.shape[1:]))
    return out


@torch.no_grad()
def gather(slices: Sequence[Slice], axis: Axis) -> None:
    """Put the slices' weights into the parameters, those of the other dp ranks too."""
    for s in slices:
        if s.weights is not s.parameter and s.weights.dtype != s.parameter.dtype:
            s.parameter.data[s.first : s.last].copy_(s.weights)
    if axis.size == 1:
        return
    for part, own in _buckets(slices, [s.parameter.data for s in slices]):
        sizes = [s.rows * s.width for s in part]
        mine = own[0].new_zeros(sum(sizes))
        for s, p, flat in zip(part, own, mine.split(sizes), strict=True):
            rows = p[s.first : s.last].reshape(-1)
            flat[: rows.numel()] = rows
        packed = mine.new_empty(axis.size, sum(sizes))
        all_gather_single(packed.view(-1), mine, group=axis.group)
        for p, column in zip(own, packed.split(sizes, 1), strict=True):
            p.view(-1).copy_(column.reshape(-1)[: p.numel()])


def _buckets(slices: Sequence[Slice], tensors: Sequence[Tensor]) -> Iterator[tuple[list[Slice], list[Tensor]]]:
    """Neighbours of one dtype, about BUCKET elements at a time."""
    part: list[Slice] = []
    own: list[Tensor] = []
    size = 0
    for s, t in zip(slices, tensors, strict=True):
        if part and (t.dtype != own[0].dtype or size + t.numel() > BUCKET):
            yield part, own
            part, own, size = [], [], 0
        part.append(s)
        own.append(t)
        size += t.numel()
    if part:
        yield part, own
