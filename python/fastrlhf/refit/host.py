"""The engine's side of a refit between processes: it owns the memory and the state, and answers trainers.

    trainer                                host
    hello {rank}                    ->     catalogue, slots, bytes, the arena's descriptor
    plan {source, digest}           ->     its own digest, refused where they differ
    begin {epoch, version, mode}    ->     the slot to write            SERVING -> DRAINING -> REFITTING
    join {epoch}                    ->     the same, for the trainer's other ranks
    done {epoch, hashes}            ->     after a rank's copies
    commit {epoch}                  ->     the version                  REFITTING -> SERVING
    fail {epoch, reason}            ->     the state

A trainer that is gone, or takes longer than it said, ends the attempt.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from .catalogue import Catalogue, PlanError, from_message, to_message
from .memory import Places, checksum, copies, run
from .plan import Plan, make_plan
from .states import PeerLost, RefitError, StaleEpoch, State, Weights
from .wire import Channel, Message


class Host:
    """
    Args:
        dest: what this engine rank holds.
        weights: its state.
        arena: the memory of its slots, one after another.
        committed: called with (slot, version) inside a commit, before anyone reads the new weights.
    """

    def __init__(
        self, dest: Catalogue, weights: Weights, arena: Any, *, rank: int = 0,
        committed: Callable[[int, int], None] | None = None,
    ) -> None:  # fmt: skip
        self.dest, self.weights, self.arena, self.rank = dest, weights, arena, rank
        self.plan: Plan | None = None
        self._committed = committed
        self._places, self.slot_bytes = self._lay()
        self._lock = threading.Lock()
        self._done: set[int] = set()
        self._watch: threading.Timer | None = None

    def _lay(self) -> tuple[list[Places], int]:
        """Where the parameters of each slot lie, and the bytes of one."""
        out: list[Places] = []
        size = 0
        for slot in range(self.weights.slots):
            places, size = Places.in_arena(self.dest, self.rank, self.arena.address + slot * size)
            out.append(places)
        if self.arena.nbytes < size * self.weights.slots:
            raise PlanError(f"arena: expected {size * self.weights.slots} bytes, got {self.arena.nbytes}")
        return out, size

    def serve(self, channel: Channel, other: Callable[[Message], bool] = lambda _: False) -> None:
        """Answers one trainer rank until it is gone. `other` takes messages of no refit and says whether it did."""
        mine = -1  # the epoch of the attempt that this connection takes part in
        try:
            while True:
                message, _ = channel.receive()
                if other(message):
                    continue
                if message["kind"] == "begin":
                    mine = int(message["epoch"])
                try:
                    mine = self._answer(channel, message, mine)
                except PeerLost:
                    raise
                except (RefitError, PlanError, ValueError, KeyError, TypeError) as error:
                    channel.send({"error": type(error).__name__, "text": str(error)})
        except PeerLost as error:
            if mine >= 0:
                self.weights.fail(mine, str(error))
        finally:
            channel.close()

    def _answer(self, channel: Channel, message: Message, mine: int) -> int:
        kind = message["kind"]
        if kind == "hello":
            w = self.weights
            channel.send(
                {"catalogue": to_message(self.dest), "rank": self.rank, "slots": w.slots, "slot_bytes": self.slot_bytes,
                 "bytes": self.arena.nbytes, "epoch": w.epoch, "version": w.version, "state": w.state.value},
                (self.arena.fd,),
            )  # fmt: skip
        elif kind == "plan":
            channel.send({"digest": self._plan(from_message(message["source"]), message["digest"], message["ignore"])})
        elif kind == "begin":
            channel.send({"slot": self._begin(message, channel)})
        elif kind == "join":
            channel.send(self._join(message))
            return self.weights.epoch
        elif kind == "done":
            self._rank_done(message)
            channel.send({})
        elif kind == "commit":
            channel.send({"version": self._commit(int(message["epoch"]), float(message["timeout"]))})
            return -1
        elif kind == "fail":
            channel.send({"state": self.weights.fail(int(message["epoch"]), message["reason"]).value})
            return -1
        elif kind == "state":
            w = self.weights
            channel.send({"state": w.state.value, "version": w.version, "epoch": w.epoch, "reason": w.reason})
        elif kind == "checksums":
            channel.send({"version": self.weights.version, "checksums": self.checksums()})
        else:
            raise ValueError(f"kind: {kind!r} is not a message of this protocol")
        return mine

    def checksums(self) -> dict[str, int]:
        """XXH3-64 of each parameter that is served."""
        lease = self.weights.acquire(60)
        try:
            places = self._places[lease.slot]
            nbytes = self.dest.params.nbytes
            return {n: checksum(int(places.address[i]), int(nbytes[i])) for i, n in self.dest.of_rank(self.rank)}
        finally:
            self.weights.release(lease)

    def _plan(self, source: Catalogue, digest: str, ignore: list[str]) -> str:
        with self._lock:
            if self.plan is None or self.plan.digest != digest:
                plan = make_plan(source, self.dest, ignore=frozenset(ignore))
                if plan.digest != digest:
                    raise PlanError(f"plan: the trainer's has the digest {digest[:16]}, this one {plan.digest[:16]}")
                self.plan = plan
            return self.plan.digest

    def _begin(self, message: Message, channel: Channel) -> int:
        if self.plan is None:
            raise RefitError("plan: none has been agreed on")
        epoch, timeout = int(message["epoch"]), float(message["timeout"])
        slot = self.weights.begin(epoch, int(message["version"]), message["mode"], timeout, alive=lambda: channel.alive)
        self._done = set()
        self._watch = threading.Timer(timeout, self.weights.fail, (epoch, f"it took longer than {timeout:g} s"))
        self._watch.daemon = True
        self._watch.start()
        return slot

    def _join(self, message: Message) -> Message:
        timeout = float(message["timeout"])
        if not self.weights.wait((State.REFITTING,), int(message["after"]), timeout):
            raise RefitError(f"join: no attempt after {message['after']} began within {timeout:g} s")
        epoch = self.weights.epoch
        return {"epoch": epoch, "slot": self.weights.current(epoch)}

    def _rank_done(self, message: Message) -> None:
        """A source rank's copies are in place; what it hashed must be what lies here."""
        epoch, rank = int(message["epoch"]), int(message["rank"])
        slot = self.weights.current(epoch)
        if message.get("hashes") is not None:
            assert self.plan is not None
            ops = self.plan.between(rank, self.rank)
            table = copies(self.plan, ops, None, self._places[slot])
            table[:, [0, 1, 4, 5]] = table[:, [1, 0, 5, 4]]  # hashed where they lie
            found = run(table, hashes=True)
            wrong = np.flatnonzero(found != np.array(message["hashes"], np.uint64))
            if wrong.size:
                param = self.plan.ops[ops[wrong[0]], 3]
                raise RefitError(f"{self.dest.params.title(int(param))}: what arrived is not what rank {rank} sent")
        with self._lock:
            self.weights.current(epoch)
            self._done.add(rank)

    def _commit(self, epoch: int, timeout: float) -> int:
        assert self.plan is not None
        slot = self.weights.current(epoch)
        needed = set(self.plan.source_rank[self.plan.between(dest=self.rank)].tolist())
        if missing := needed - self._done:
            raise RefitError(f"commit: rank(s) {sorted(missing)} have not written their part")
        self._fill_pads(slot)
        if self._committed is not None:
            self._committed(slot, self.weights._target[1])
        version = self.weights.commit(epoch)
        if self._watch is not None:
            self._watch.cancel()
        return version

    def _fill_pads(self, slot: int) -> None:
        """Zeros where no tensor has anything. Nobody else writes there, but whoever owns the memory may have."""
        places, sizes = self._places[slot], self.dest.params.nbytes // self.dest.params.shape.prod(1)
        memory = np.frombuffer(self.arena, np.uint8)
        for param, row, col, rows, cols in self.dest.pads.tolist():
            if self.dest.params.rank[param] != self.rank:
                continue
            begin = int(places.address[param]) - self.arena.address
            shape = self.dest.params.shape[param]
            block = memory[begin : begin + int(shape.prod() * sizes[param])].reshape(int(shape[0]), -1)
            block[row : row + rows, col * sizes[param] : (col + cols) * sizes[param]] = 0


def answered(message: Message) -> Message:
    """An answer, or the error that it says."""
    kinds = {"StaleEpoch": StaleEpoch, "PlanError": PlanError, "PeerLost": PeerLost}
    if "error" in message:
        raise kinds.get(message["error"], RefitError)(message["text"])
    return message
