"""The engine's side of a refit between processes: it owns the memory and the state, and answers trainers.

    trainer                                host
    hello {rank}                    ->     catalogue, slots, bytes, the arena's descriptor
    plan {source, digest}           ->     its own digest, refused where they differ
    begin {epoch, version, mode}    ->     the slot to write            SERVING -> DRAINING -> REFITTING
    join {epoch}                    ->     the same, for the trainer's other ranks
    done {epoch, hashes}            ->     after a rank's copies
    commit {epoch}                  ->     the version, once every rank is done      REFITTING -> SERVING
    outcome {epoch}                 ->     the same, to the other ranks
    fail {epoch, reason}            ->     the state

A trainer that is gone, or takes longer than it said, ends the attempt. An attempt belongs to the connections that began or
joined it: others can neither end it nor begin another while one of them may still write.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .catalogue import Catalogue, PlanError, from_message, to_message
from .memory import Places, checksum, copies, run
from .plan import Plan, make_plan
from .states import PeerLost, RefitError, StaleEpoch, State, Weights
from .wire import Channel, Message


@dataclass
class Visit:
    """One trainer rank's connection: the attempt that it takes part in, -1 for none, and the plan it agreed on."""

    channel: Channel
    epoch: int = -1
    plan: Plan | None = None


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
        self.plan: Plan | None = None  # the last that was agreed on, then that of the attempt under way
        self._committed = committed
        self._places, self.slot_bytes = self._lay()
        self._lock = threading.Condition()
        self._done: dict[int, set[int]] = {}  # by epoch
        self._writing: dict[int, int] = {}  # epoch by connection
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
        visit, reason = Visit(channel), "the connection to the trainer ended"
        try:
            while True:
                message, _ = channel.receive()
                if other(message):
                    continue
                try:
                    channel.send(*self._answer(visit, message))
                except PeerLost:
                    raise
                except Exception as error:  # whatever it is, the trainer hears of it
                    channel.send({"error": type(error).__name__, "text": str(error)})
        except PeerLost as error:
            reason = str(error)
        finally:
            self._leave(visit)
            if visit.epoch >= 0:
                self.weights.fail(visit.epoch, reason)
            channel.close()

    def _answer(self, visit: Visit, message: Message) -> tuple[Message, tuple[int, ...]]:
        w, kind = self.weights, message["kind"]
        if kind == "hello":
            return {
                "catalogue": to_message(self.dest), "rank": self.rank, "slots": w.slots, "slot_bytes": self.slot_bytes,
                "bytes": self.arena.nbytes, "epoch": w.epoch, "version": w.version, "state": w.state.value,
            }, (self.arena.fd,)  # fmt: skip
        return self._answers(visit, message, kind), ()

    def _answers(self, visit: Visit, message: Message, kind: str) -> Message:
        w = self.weights
        if kind == "plan":
            return {"digest": self._plan(visit, from_message(message["source"]), message["digest"], message["ignore"])}
        if kind == "begin":
            return {"slot": self._begin(visit, message)}
        if kind == "join":
            return self._join(visit, message)
        if kind == "done":
            self._own(visit, message)
            self._rank_done(message)
            self._leave(visit)
            return {}
        if kind == "commit":
            version = self._commit(self._own(visit, message), float(message["timeout"]))
            visit.epoch = -1
            return {"version": version}
        if kind == "outcome":
            version = w.outcome(self._own(visit, message), float(message["timeout"]))
            visit.epoch = -1
            return {"version": version}
        if kind == "fail":
            self._leave(visit)
            if visit.epoch == int(message["epoch"]):
                visit.epoch = -1
                w.fail(int(message["epoch"]), message["reason"])
            return {"state": w.state.value}
        if kind == "state":
            return {"state": w.state.value, "version": w.version, "epoch": w.epoch, "reason": w.reason}
        if kind == "checksums":
            return {"version": w.version, "checksums": self.checksums()}
        raise ValueError(f"kind: {kind!r} is not a message of this protocol")

    @staticmethod
    def _own(visit: Visit, message: Message) -> int:
        """The message's epoch, which must be that of this connection's attempt."""
        if int(message["epoch"]) != visit.epoch:
            raise StaleEpoch(f"epoch: {message['epoch']} is not this connection's attempt ({visit.epoch})")
        return visit.epoch

    def _leave(self, visit: Visit) -> None:
        """It writes no more."""
        with self._lock:
            self._writing.pop(id(visit), None)

    def checksums(self) -> dict[str, int]:
        """XXH3-64 of each parameter that is served."""
        lease = self.weights.acquire(60)
        try:
            places = self._places[lease.slot]
            nbytes = self.dest.params.nbytes
            return {n: checksum(int(places.address[i]), int(nbytes[i])) for i, n in self.dest.of_rank(self.rank)}
        finally:
            self.weights.release(lease)

    def _plan(self, visit: Visit, source: Catalogue, digest: str, ignore: list[str]) -> str:
        with self._lock:
            plan = self.plan
            if plan is None or plan.digest != digest:
                plan = make_plan(source, self.dest, ignore=frozenset(ignore))
                if plan.digest != digest:
                    raise PlanError(f"plan: the trainer's has the digest {digest[:16]}, this one {plan.digest[:16]}")
            visit.plan = plan
            if not self._writing:
                self.plan = plan
            return plan.digest

    def _begin(self, visit: Visit, message: Message) -> int:
        if visit.plan is None:
            raise RefitError("plan: none has been agreed on")
        epoch, timeout = int(message["epoch"]), float(message["timeout"])
        with self._lock:
            if others := [e for v, e in self._writing.items() if v != id(visit)]:
                raise RefitError(f"begin: whoever wrote attempt {max(others)} has not said that it is done, and is still there")
        channel = visit.channel
        slot = self.weights.begin(epoch, int(message["version"]), message["mode"], timeout, alive=lambda: channel.alive)
        with self._lock:
            visit.epoch, self.plan = epoch, visit.plan
            self._writing[id(visit)] = epoch
            self._done = {e: ranks for e, ranks in self._done.items() if e == epoch}
        self._watch = threading.Timer(timeout, self.weights.fail, (epoch, f"it took longer than {timeout:g} s"))
        self._watch.daemon = True
        self._watch.start()
        return slot

    def _join(self, visit: Visit, message: Message) -> Message:
        timeout = float(message["timeout"])
        if not self.weights.wait((State.REFITTING,), int(message["after"]), timeout):
            raise RefitError(f"join: no attempt after {message['after']} began within {timeout:g} s")
        epoch = self.weights.epoch
        slot = self.weights.current(epoch)
        with self._lock:
            visit.epoch = epoch
            self._writing[id(visit)] = epoch
        return {"epoch": epoch, "slot": slot}

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
            self._done.setdefault(epoch, set()).add(rank)
            self._lock.notify_all()

    def _commit(self, epoch: int, timeout: float) -> int:
        """Waits for the other ranks' parts."""
        plan = self.plan
        assert plan is not None
        needed = set(plan.source_rank[plan.between(dest=self.rank)].tolist())
        with self._lock:
            self._lock.wait_for(lambda: self._ended(epoch) or needed <= self._done.get(epoch, set()), timeout)
            missing = needed - self._done.get(epoch, set())
        if missing:
            raise RefitError(f"commit: rank(s) {sorted(missing)} have not written their part within {timeout:g} s")
        slot = self.weights.current(epoch)
        self._fill_pads(slot)
        if self._committed is not None:
            self._committed(slot, self.weights._target[1])
        version = self.weights.commit(epoch)
        if self._watch is not None:
            self._watch.cancel()
        return version

    def _ended(self, epoch: int) -> bool:
        return self.weights.epoch != epoch or self.weights.state is not State.REFITTING

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
