"""Who holds what: the tensor-, pipeline- and data-parallel groups of this process."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Axis:
    """One dimension of the grid of processes. `group` is None where size is 1; `ranks` are its members' global ranks."""

    group: ProcessGroup | None = None
    rank: int = 0
    size: int = 1
    ranks: tuple[int, ...] = (0,)

    def share(self, name: str, total: int) -> int:
        """total / size, which must come out even; `name` is what is shared out, for the error."""
        if total % self.size:
            raise ValueError(f"{name}: {total} cannot be shared evenly among {self.size} tensor-parallel processes")
        return total // self.size

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def last(self) -> bool:
        return self.rank == self.size - 1


@dataclass(frozen=True)
class Channels:
    """Groups for the sends between pipeline stages: one for each direction, so that a send that waits never stands before a
    receive that would let it go on. With two stages the way around, of interleaved stages, runs between the same two
    processes as the way along, and has groups of its own."""

    forward: ProcessGroup | None = None
    backward: ProcessGroup | None = None
    around_forward: ProcessGroup | None = None
    around_backward: ProcessGroup | None = None


@dataclass(frozen=True)
class ParallelGroups:
    """The grid tp x dp x pp, tp fastest: rank = (pp_rank · dp + dp_rank) · tp + tp_rank. One process is tp = pp = dp = 1.

    tp talks most and wants the fastest links, so its members are neighbours; pp talks least and is cut first between
    machines. `replicas` are the pp · dp processes of one tp rank, in the order pp_rank · dp + dp_rank; `world` are all.
    `ends` are the first and the last stage of a pipeline, which share tied embeddings; of size 1 in the stages between.
    """

    tp: Axis = Axis()
    dp: Axis = Axis()
    pp: Axis = Axis()
    replicas: Axis = Axis()
    world: Axis = Axis()
    ends: Axis = Axis()
    channels: Channels = field(default=Channels(), compare=False)

    @staticmethod
    def create(
        tp: int = 1, pp: int = 1, dp: int | None = None, cp: int = 1, *, timeout: float | None = None
    ) -> ParallelGroups:  # fmt: skip
        """The groups of this process. Every process must call it, with the same sizes.

        Args:
            dp: None is what is left of the world.
            cp: context parallelism, which there is not; 1.
            timeout: seconds that an exchange within a group may take; None is torch's default for the backend. The world
                has the one that it was made with.

        Raises:
            ValueError: sizes below 1, or whose product is not the number of processes.
        """
        sizes = {"tp": tp, "pp": pp, "cp": cp} | ({} if dp is None else {"dp": dp})
        if min(sizes.values()) < 1:
            raise ValueError(f"{', '.join(sizes)}: expected sizes >= 1, got " + ", ".join(f"{k}={v}" for k, v in sizes.items()))
        if cp != 1:
            raise ValueError(f"cp: there is no context parallelism, expected 1, got {cp}")
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world % (tp * pp):
            raise ValueError(f"tp, pp: {tp} x {pp} does not divide the {world} process(es) of this run")
        if dp is not None and tp * pp * dp != world:
            raise ValueError(f"tp, pp, dp: {tp} x {pp} x {dp} is {tp * pp * dp}, this run has {world} process(es)")
        if world == 1:
            return ParallelGroups()
        rows = grid(tp, pp, world // (tp * pp))
        rank = dist.get_rank()
        axes = {name: _axis(members, rank, timeout) for name, members in rows.items()}
        everyone = Axis(dist.group.WORLD, rank, world, tuple(range(world)))
        return ParallelGroups(**axes, world=everyone, channels=_channels(rows["pp"], rank, timeout))

    def check(self, **shared: int) -> None:
        """Refuse what tp does not divide, as `check(num_attention_heads=32, vocab_size=32000)`.

        Raises:
            ValueError: the first that it does not, by name.
        """
        for name, total in shared.items():
            self.tp.share(name, total)

    @property
    def place(self) -> str:
        """Where this process sits."""
        return f"rank {self.world.rank} (tp {self.tp.rank}, pp {self.pp.rank}, dp {self.dp.rank})"

    @property
    def leader(self) -> bool:
        """Whether this process speaks for all."""
        return self.world.rank == 0

    def picture(self) -> str:
        """Who sits where: a row for each pipeline stage, a column for each data-parallel replica, the ranks of the
        tensor-parallel group in the cell."""
        return picture(self.tp.size, self.pp.size, self.dp.size)


def grid(tp: int, pp: int, dp: int) -> dict[str, list[list[int]]]:
    """The members of every group, by axis: global ranks."""
    at = [[[(p * dp + d) * tp + t for t in range(tp)] for d in range(dp)] for p in range(pp)]
    return {
        "tp": [at[p][d] for p in range(pp) for d in range(dp)],
        "dp": [[at[p][d][t] for d in range(dp)] for p in range(pp) for t in range(tp)],
        "pp": [[at[p][d][t] for p in range(pp)] for d in range(dp) for t in range(tp)],
        "replicas": [[at[p][d][t] for p in range(pp) for d in range(dp)] for t in range(tp)],
        "ends": [sorted({at[0][d][t], at[-1][d][t]}) for d in range(dp) for t in range(tp)],
    }


def coordinates(rank: int, tp: int, pp: int, dp: int) -> str:
    """Where a rank sits, in words."""
    return f"rank {rank} (tp {rank % tp}, pp {rank // (tp * dp)}, dp {rank // tp % dp})"


def picture(tp: int, pp: int, dp: int) -> str:
    """`ParallelGroups.picture` of sizes that need not be running."""
    cells = [[" ".join(str((p * dp + d) * tp + t) for t in range(tp)) for d in range(dp)] for p in range(pp)]
    width = max(5, *(len(c) for row in cells for c in row))
    head = " " * 7 + "  ".join(f"dp {d}".ljust(width) for d in range(dp))
    lines = [f"pp {p}".ljust(7) + "  ".join(c.ljust(width) for c in row) for p, row in enumerate(cells)]
    title = f"{tp * pp * dp} processes: tp {tp} x pp {pp} x dp {dp}; a cell lists a tensor-parallel group's ranks"
    return "\n".join(line.rstrip() for line in (title, head, *lines))


def _axis(rows: list[list[int]], rank: int, timeout: float | None) -> Axis:
    mine = Axis(ranks=(rank,))
    limit = None if timeout is None else timedelta(seconds=timeout)  # a new group does not take the world's
    for members in rows:
        if len(members) == 1:
            continue
        group = dist.new_group(members, timeout=limit)  # collective: every process makes every group
        if rank in members:
            mine = Axis(group, members.index(rank), len(members), tuple(members))
    return mine


def _channels(rows: list[list[int]], rank: int, timeout: float | None) -> Channels:
    stages = len(rows[0])
    names = ["forward", "backward", "around_forward", "around_backward"][: 0 if stages == 1 else 4 if stages == 2 else 2]
    return Channels(**{name: _axis(rows, rank, timeout).group for name in names})
