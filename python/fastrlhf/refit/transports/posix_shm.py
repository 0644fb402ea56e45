"""Two processes on one machine: the trainer copies its live parameters straight into the engine's, which lie in memory that
both map. One copy, no staging, no clone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..catalogue import Catalogue, from_message, merged, to_message
from ..host import answered
from ..memory import Bound, Places, copies, run, shared_memory
from ..plan import Plan, make_plan
from ..session import Transfer
from ..states import PeerLost, RefitError
from ..wire import Channel, Message

BUCKET = 256 << 20  # bytes between two looks whether the other side is alive


class PosixShm:
    """The `Target` of a trainer rank: engine ranks behind channels, one each.

    Args:
        source: what all ranks of the trainer hold.
        rank: which of them this is; rank 0 leads the attempts.
        tensors: this rank's parameters by name, as in `source`; copies are planned for where they lie, and planned again
            where one has moved.
        verify: hash what is copied, in the same read, and compare with what the engine finds in its memory.
        ignore: tensors of the trainer that the engine does without.
    """

    def __init__(
        self, channels: list[Channel], source: Catalogue, tensors: Mapping[str, Tensor], *, rank: int = 0, verify: bool = False,
        threads: int | None = None, ignore: frozenset[str] = frozenset(), timeout: float = 60.0,
    ) -> None:  # fmt: skip
        self.channels, self.rank, self.verify, self.timeout = channels, rank, verify, timeout
        self.threads = threads or torch.get_num_threads()
        self._engines: list[_Engine] = []
        for channel in channels:
            channel.send({"kind": "hello", "rank": rank}, timeout=timeout)
            message, fds = channel.receive(timeout)
            self._engines.append(_Engine(channel, answered(message), fds[0], source, rank, ignore, timeout))
        self.slots = min(e.slots for e in self._engines)
        self.epoch = max(e.epoch for e in self._engines)
        self.version: int | None = min(e.version for e in self._engines)
        if self.version < 0:
            self.version = None
        self._bound = Bound(source, rank, tensors, self._bind)

    def _bind(self, source: Places) -> None:
        for engine in self._engines:
            engine.bind(source)

    @property
    def atomic(self) -> bool:
        return self.slots == 2 and len(self._engines) == 1

    @property
    def alive(self) -> bool:
        return all(c.alive for c in self.channels)

    @property
    def nbytes(self) -> int:
        """What this rank writes."""
        return sum(e.nbytes for e in self._engines)

    @property
    def plans(self) -> list[Plan]:
        return [e.plan for e in self._engines]

    def begin(self, epoch: int, version: int, mode: str, timeout: float) -> None:
        self._seconds = timeout
        for e in self._engines:
            if self.rank == 0:
                e.begin({"kind": "begin", "epoch": epoch, "version": version, "mode": mode, "timeout": timeout}, epoch)
            else:
                e.begin({"kind": "join", "after": epoch - 1, "timeout": timeout}, epoch)

    def transfer(self, epoch: int) -> Transfer:
        self._bound.refresh()
        for e in self._engines:
            hashes = e.copy(self.verify, self.threads)
            e.ask({"kind": "done", "epoch": epoch, "rank": self.rank, "hashes": hashes}, self._seconds)
        return Transfer(self.nbytes, 1)

    def commit(self, epoch: int, version: int) -> None:
        kind = "outcome" if self.rank else "commit"
        for e in self._engines:
            # the engine itself waits as long for the other ranks
            got = e.ask({"kind": kind, "epoch": epoch, "timeout": self._seconds}, self._seconds + 2)["version"]
            if got != version:
                raise RefitError(f"commit: the engine says version {got}, expected {version}")

    def fail(self, epoch: int, reason: str) -> None:
        errors: list[Exception] = []
        for e in self._engines:  # one that is gone keeps nobody from telling the others
            try:
                e.ask({"kind": "fail", "epoch": epoch, "reason": reason, "written": e.written}, self.timeout)
            except RefitError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def state(self) -> Message:
        """Of the first engine rank: state, version, epoch, reason."""
        return self._engines[0].ask({"kind": "state"}, self.timeout)

    def checksums(self) -> list[dict[str, int]]:
        """XXH3-64 of every parameter that each engine rank serves."""
        return [e.ask({"kind": "checksums"}, self.timeout)["checksums"] for e in self._engines]

    def close(self) -> None:
        for e in self._engines:
            e.close()


class _Engine:
    """One engine rank, seen from a trainer rank."""

    def __init__(
        self, channel: Channel, hello: Message, fd: int, source: Catalogue, rank: int, ignore: frozenset[str], timeout: float
    ) -> None:
        self.channel = channel
        self.slots, self.epoch, self.version = int(hello["slots"]), int(hello["epoch"]), int(hello["version"])
        dest = from_message(hello["catalogue"])
        self._arena: Any = shared_memory(int(hello["bytes"]), fd)
        self._slot_bytes = int(hello["slot_bytes"])
        self.plan = make_plan(source, dest, ignore=ignore)
        self.ask({"kind": "plan", "source": to_message(source), "digest": self.plan.digest, "ignore": sorted(ignore)}, timeout)
        self._ops = self.plan.between(rank, int(hello["rank"]))
        self._rank = int(hello["rank"])
        self.nbytes = int(self.plan.nbytes[self._ops].sum())
        self._tables: list[list[np.ndarray]] = []
        self._slot, self.written = 0, False

    def bind(self, source: Places) -> None:
        self._tables = []
        for slot in range(self.slots):
            dest, _ = Places.in_arena(self.plan.dest, self._rank, self._arena.address + slot * self._slot_bytes)
            table = copies(self.plan, self._ops, source, dest)
            cuts = np.flatnonzero(np.diff(np.cumsum(table[:, 2] * table[:, 3]) // BUCKET)) + 1
            self._tables.append([np.ascontiguousarray(t) for t in np.split(table, cuts)])

    def begin(self, message: Message, epoch: int) -> None:
        self.written = False
        answer = self.ask(message, float(message["timeout"]) + 2)
        if answer.get("epoch", epoch) != epoch:
            raise RefitError(f"epoch: this rank is at {epoch}, the engine at {answer['epoch']}")
        self._slot = int(answer["slot"])

    def copy(self, verify: bool, threads: int) -> list[int] | None:
        out: list[int] = []
        self.written = True
        for table in self._tables[self._slot]:
            hashes = run(table, hashes=verify, threads=threads)
            if hashes is not None:
                out += hashes.tolist()
            if not self.channel.alive:
                self.close()
                raise PeerLost(f"{self.channel.peer}: it is gone")
        return out if verify else None

    def ask(self, message: Message, timeout: float) -> Message:
        try:
            return answered(self.channel.ask(message, timeout))
        except PeerLost:
            self.close()
            raise

    def close(self) -> None:
        """Its memory goes when the engine's process and this both let go of it."""
        self.channel.close()
        self._arena, self._tables = None, []


def gathered(mine: Catalogue, group: Any = None) -> Catalogue:
    """Every rank's catalogue in one, on every rank: a collective over torch.distributed, once a run."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return mine
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, to_message(mine), group=group)
    return merged([from_message(m) for m in every])
