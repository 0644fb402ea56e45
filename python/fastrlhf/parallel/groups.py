"""Who holds what: the tensor-, pipeline- and data-parallel groups of this process."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Axis:
    """One dimension of the grid of processes. `group` is None where size is 1."""

    group: ProcessGroup | None = None
    rank: int = 0
    size: int = 1

    def share(self, name: str, total: int) -> int:
        """total / size, which must come out even; `name` is what is shared out, for the error."""
        if total % self.size:
            raise ValueError(f"{name}: {total} cannot be shared evenly among {self.size} tensor-parallel processes")
        return total // self.size


@dataclass(frozen=True)
class ParallelGroups:
    """The grid tp x dp x pp, tp fastest: rank = (pp_rank · dp + dp_rank) · tp + tp_rank. One process is tp = pp = dp = 1."""

    tp: Axis = Axis()
    dp: Axis = Axis()
    pp: Axis = Axis()

    @staticmethod
    def create(tp: int = 1, pp: int = 1) -> ParallelGroups:
        """The groups of this process; dp is what is left of the world. Every process must call it, with the same sizes.

        Raises:
            ValueError: sizes below 1, or whose product does not divide the number of processes.
        """
        if tp < 1 or pp < 1:
            raise ValueError(f"tp, pp: expected sizes >= 1, got tp={tp}, pp={pp}")
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world % (tp * pp):
            raise ValueError(f"tp, pp: {tp} x {pp} does not divide the {world} process(es) of this run")
        if world == 1:
            return ParallelGroups()
        dp, rank = world // (tp * pp), dist.get_rank()
        grid = [[[(p * dp + d) * tp + t for t in range(tp)] for d in range(dp)] for p in range(pp)]
        rows = {
            "tp": [grid[p][d] for p in range(pp) for d in range(dp)],
            "dp": [[grid[p][d][t] for d in range(dp)] for p in range(pp) for t in range(tp)],
            "pp": [[grid[p][d][t] for p in range(pp)] for d in range(dp) for t in range(tp)],
        }
        axes = {name: _axis(members, rank) for name, members in rows.items()}
        return ParallelGroups(**axes)


def _axis(rows: list[list[int]], rank: int) -> Axis:
    mine = Axis()
    for members in rows:
        if len(members) == 1:
            continue
        group = dist.new_group(members)  # collective: every process makes every group
        if rank in members:
            mine = Axis(group, members.index(rank), len(members))
    return mine
