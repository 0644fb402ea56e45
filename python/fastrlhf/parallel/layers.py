"""Linear layers and embeddings whose weights are shards of the tensor-parallel group's. tp = 1 is the whole weight.

With sequence parallelism what comes into a column-parallel layer and out of a row-parallel one is this rank's share of the
rows (tokens / tp, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .collectives import column_linear, copy_to_shards, gather_last, scatter_rows, sum_of_shards
from .groups import Axis, ParallelGroups
from .sharding import Piece, Sharding, even, mark


@dataclass
class SequenceParallel:
    """Whether the tp ranks share the rows between the blocks of a model; all of its layers look at the same one."""

    on: bool = False


Adapter = Callable[[Tensor, Tensor], Tensor]  # (input, output of the layer) -> output with the adapter's share


class ColumnParallelLinear(nn.Module):
    """y = x Wᵀ + b for several projections of one input, held as one weight: (..., in) -> (..., Σ out / tp).

    `parts` names the projections in their order and gives their whole widths; a rank holds an equal share of each.
    """

    def __init__(
        self, inputs: int, parts: Mapping[str, int], *, bias: bool, groups: ParallelGroups,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, sequence: SequenceParallel | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.axis, self.sequence = groups.tp, sequence or SequenceParallel()
        self.parts = {name: self.axis.share(name, width) for name, width in parts.items()}
        width = sum(self.parts.values())
        self.weight = nn.Parameter(torch.empty(width, inputs, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(width, device=device, dtype=dtype)) if bias else None
        self.adapter: Adapter | None = None
        pieces = self._pieces()
        whole = width * self.axis.size
        mark(self.weight, Sharding((whole, inputs), 0, pieces))
        if self.bias is not None:
            mark(self.bias, Sharding((whole,), 0, pieces))

    def _pieces(self) -> tuple[Piece, ...]:
        """The projections stand one after another in the whole weight too."""
        pieces, local, whole = [], 0, 0
        for width in self.parts.values():
            pieces.append(Piece(local, whole + self.axis.rank * width, width))
            local, whole = local + width, whole + width * self.axis.size
        return tuple(pieces)

    def rows(self, part: str) -> slice:
        """Where a projection lies in this rank's weight."""
        at = 0
        for name, width in self.parts.items():
            if name == part:
                return slice(at, at + width)
            at += width
        raise KeyError(part)

    def load(self, part: str, kind: str, whole: Tensor) -> None:
        """Copy this rank's share of a projection's whole `kind` ("weight" or "bias")."""
        _load(f"{part}.{kind}", getattr(self, kind)[self.rows(part)], whole, 0, self.axis)

    def forward(self, x: Tensor) -> Tensor:
        y = column_linear(x, self.weight, self.bias, self.axis, self.sequence.on)
        return y if self.adapter is None else self.adapter(x, y)


class RowParallelLinear(nn.Module):
    """y = Σ over ranks of x_rank W_rankᵀ: (..., in / tp) -> (..., out), with the bias added once."""

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool, groups: ParallelGroups,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, sequence: SequenceParallel | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.axis, self.sequence = groups.tp, sequence or SequenceParallel()
        self.weight = nn.Parameter(torch.empty(outputs, self.axis.share("inputs", inputs), device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(outputs, device=device, dtype=dtype)) if bias else None
        self.adapter: Adapter | None = None
        mark(self.weight, even(self.weight, 1, self.axis.rank, self.axis.size))
        if self.bias is not None:
            mark(self.bias, Sharding((outputs,), partial=self.sequence.on))

    def load(self, name: str, kind: str, whole: Tensor) -> None:
        """Copy this rank's share of the whole `kind` ("weight" or "bias")."""
        _load(f"{name}.{kind}", getattr(self, kind), whole, 1 if kind == "weight" else None, self.axis)

    def forward(self, x: Tensor) -> Tensor:
        if self.axis.size == 1:
            y = F.linear(x, self.weight, self.bias)
            return y if self.adapter is None else self.adapter(x, y)
        y = F.linear(x, self.weight)
        if self.adapter is not None:
            y = self.adapter(x, y)
        y = scatter_rows(y, self.axis) if self.sequence.on else sum_of_shards(y, self.axis)
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(nn.Module):
    """(…) token ids -> (…, hidden). A rank holds the rows [rank · V / tp, (rank + 1) · V / tp)."""

    def __init__(
        self, vocab: int, hidden: int, *, groups: ParallelGroups,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, sequence: SequenceParallel | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.axis, self.sequence = groups.tp, sequence or SequenceParallel()
        self.rows = self.axis.share("vocabulary", vocab)
        self.weight = nn.Parameter(torch.empty(self.rows, hidden, device=device, dtype=dtype))
        mark(self.weight, even(self.weight, 0, self.axis.rank, self.axis.size))

    @property
    def first(self) -> int:
        return self.axis.rank * self.rows

    def load(self, name: str, kind: str, whole: Tensor) -> None:
        """Copy this rank's rows of the whole weight."""
        _load(f"{name}.{kind}", self.weight, whole, 0, self.axis)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.axis.size == 1:
            return F.embedding(tokens, self.weight)
        local = tokens - self.first
        mine = (local >= 0) & (local < self.rows)
        x = F.embedding(torch.where(mine, local, 0), self.weight) * mine.unsqueeze(-1)
        return scatter_rows(x, self.axis) if self.sequence.on else sum_of_shards(x, self.axis)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden Wᵀ: (…, hidden) -> this rank's (…, V / tp)."""
        return F.linear(copy_to_shards(hidden, self.axis), self.weight)


def whole_of(shard: Tensor, dim: int | None, axis: Axis) -> Tensor:
    """The whole tensor of which each rank holds a shard along `dim`; itself where it is not sharded (None)."""
    if axis.size == 1 or dim is None:
        return shard
    return gather_last(shard.detach().movedim(dim, -1), axis).movedim(-1, dim)


@torch.no_grad()
def _load(name: str, to: Tensor, whole: Tensor, dim: int | None, axis: Axis) -> None:
    expected = list(to.shape)
    if dim is not None:
        expected[dim] *= axis.size
    if list(whole.shape) != expected:
        raise ValueError(f"{name}: expected shape {tuple(expected)}, the checkpoint has {tuple(whole.shape)}")
    width = to.shape[dim] if dim is not None else 0
    to.copy_(whole if dim is None else whole.narrow(dim, axis.rank * width, width))
