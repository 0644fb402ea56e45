"""The engine's side of a refit between processes: it owns the memory and the state, and answers trainers.

    trainer                                host
    hello {rank}                    ->     catalogue, slots, bytes, the arena's descriptor
    plan {source, digest}           ->     its own digest, refused where they differ
    begin {epoch, version, mode}    ->     the slot to write            SERVING -> DRAINING -> REFITTING
    join {epoch}                    ->     the same, for the trainer's other ranks
    done {epoch, hashes}            ->     after a rank's copies
    commit {epoch}                  ->     the version, once every rank is done      REFITTING -> SERVING
    outcome {epoch}                 ->     the same, to the other ranks
    fail {epoch, reason, written}   ->     the state

A trainer that is gone, or takes longer than it said, ends the attempt. An attempt belongs to the connections that began or
joined it, all by one plan: others can neither end it nor begin another while one of them may still write.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .catalogue import Catalogue, PlanError, from_message, to_message
from .memory import Places, checksum, copies, run
from .plan import Plan, make_plan
from .states import PeerLost, RefitError, StaleEpoch, State, Weights
from .wire import Channel, Message


@dataclass(eq=False)
class Attempt:
    """A refit of one plan: the slot that it writes, the source ranks whose part is there, and the clock that ends it."""

    epoch: int
    slot: int
    version: int
    plan: Plan
    clock: threading.Timer
    done: set[int] = field(default_factory=set)


@dataclass(eq=False)
class Visit:
    """One trainer rank's connection: the plan it agreed on, and the attempt that it takes part in."""

    channel: Channel
    plan: Plan | None = None
    attempt: Attempt | None = None

    def alive(self) -> bool:
        return self.channel.alive


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
        self._committed = committed
        self._places, self.slot_bytes = self._lay()
        self._lock = weights.changed  # state, attempt and writers change together
        self._plan: Plan | None = None  # the last that was agreed on
        self._attempt: Attempt | None = None  # the last that began
        self._writing: set[Visit] = set()

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
            self._give_up(visit, reason)
            channel.close()
            self._closed(visit)

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
            return {"digest": self._agree(visit, message)}
        if kind == "begin":
            return {"slot": self._begin(visit, message)}
        if kind == "join":
            return self._join(visit, message)
        if kind == "done":
            self._rank_done(self._own(visit, message), message)
            self._leave(visit)
            return {}
        if kind == "commit":
            version = self._commit(self._own(visit, message), float(message["timeout"]), visit.alive)
            visit.attempt = None
            return {"version": version}
        if kind == "outcome":
            version = w.outcome(self._own(visit, message).epoch, float(message["timeout"]), visit.alive)
            visit.attempt = None
            return {"version": version}
        if kind == "fail":
            if visit.attempt is not None and visit.attempt.epoch == int(message["epoch"]):
                self._give_up(visit, message["reason"], written=message["written"])
            return {"state": w.state.value}
        if kind == "state":
            return {"state": w.state.value, "version": w.version, "epoch": w.epoch, "reason": w.reason}
        if kind == "checksums":
            return {"version": w.version, "checksums": self.checksums()}
        raise ValueError(f"kind: {kind!r} is not a message of this protocol")

    @staticmethod
    def _own(visit: Visit, message: Message) -> Attempt:
        """The message's attempt, which must be this connection's."""
        attempt = visit.attempt
        if attempt is None or int(message["epoch"]) != attempt.epoch:
            raise StaleEpoch(f"epoch: {message['epoch']} is not this connection's attempt ({attempt and attempt.epoch})")
        return attempt

    def _leave(self, visit: Visit) -> None:
        """It writes no more."""
        with self._lock:
            self._writing.discard(visit)

    def _give_up(self, visit: Visit, reason: str, *, written: bool = True) -> None:
        """Ends the visit's attempt; whether something was `written` is what this rank says, and the others may have."""
        with self._lock:
            self._leave(visit)
            attempt, visit.attempt = visit.attempt, None
            if attempt is not None:
                self.weights.fail(attempt.epoch, reason, written=written or bool(attempt.done or self._writing))

    def _closed(self, visit: Visit) -> None:
        """The connection has ended: for what was kept for it."""

    def checksums(self) -> dict[str, int]:
        """XXH3-64 of each parameter that is served."""
        lease = self.weights.acquire(60)
        try:
            places = self._places[lease.slot]
            nbytes = self.dest.params.nbytes
            return {n: checksum(int(places.address[i]), int(nbytes[i])) for i, n in self.dest.of_rank(self.rank)}
        finally:
            self.weights.release(lease)

    def _agree(self, visit: Visit, message: Message) -> str:
        if visit.attempt is not None:
            raise RefitError(f"plan: attempt {visit.attempt.epoch} of this connection is under way")
        digest, plan = message["digest"], self._plan
        if plan is None or plan.digest != digest:
            plan = make_plan(from_message(message["source"]), self.dest, ignore=frozenset(message["ignore"]))
            if plan.digest != digest:
                raise PlanError(f"plan: the trainer's has the digest {digest[:16]}, this one {plan.digest[:16]}")
        visit.plan = self._plan = plan
        return plan.digest

    def _begin(self, visit: Visit, message: Message) -> int:
        if visit.plan is None:
            raise RefitError("plan: none has been agreed on")
        epoch, version, timeout = int(message["epoch"]), int(message["version"]), float(message["timeout"])

        def admit() -> None:
            if others := [v.attempt.epoch for v in self._writing - {visit} if v.attempt is not None]:
                raise RefitError(f"begin: whoever wrote attempt {max(others)} has not said that it is done, and is still there")

        with self._lock:
            slot = self.weights.begin(epoch, version, message["mode"], timeout, alive=visit.alive, admit=admit)
            if self._attempt is not None:
                self._attempt.clock.cancel()
            clock = threading.Timer(timeout, self.weights.fail, (epoch, f"it took longer than {timeout:g} s"))
            clock.daemon = True
            clock.start()
            self._attempt = visit.attempt = Attempt(epoch, slot, version, visit.plan, clock)
            self._writing.add(visit)
        return slot

    def _join(self, visit: Visit, message: Message) -> Message:
        w, after, timeout = self.weights, int(message["after"]), float(message["timeout"])
        with self._lock:
            if not w.until(lambda: w.epoch > after and w.state is State.REFITTING, timeout, visit.alive):
                raise RefitError(f"join: no attempt after {after} began within {timeout:g} s")
            attempt = self._attempt
            assert attempt is not None
            if visit.plan is None or visit.plan.digest != attempt.plan.digest:
                raise PlanError(f"join: attempt {attempt.epoch} has another plan")
            visit.attempt = attempt
            self._writing.add(visit)
        return {"epoch": attempt.epoch, "slot": attempt.slot}

    def _rank_done(self, attempt: Attempt, message: Message) -> None:
        """A source rank's copies are in place; what it hashed must be what lies here."""
        rank, plan = int(message["rank"]), attempt.plan
        if message.get("hashes") is not None:
            ops = plan.between(rank, self.rank)
            table = copies(plan, ops, None, self._places[attempt.slot])
            table[:, [0, 1, 4, 5]] = table[:, [1, 0, 5, 4]]  # hashed where they lie
            found = run(table, hashes=True)
            wrong = np.flatnonzero(found != np.array(message["hashes"], np.uint64))
            if wrong.size:
                param = plan.ops[ops[wrong[0]], 3]
                raise RefitError(f"{self.dest.params.title(int(param))}: what arrived is not what rank {rank} sent")
        self._count(attempt, rank)

    def _count(self, attempt: Attempt, rank: int) -> None:
        """A source rank's part is there, if that was in time."""
        with self._lock:
            self.weights.current(attempt.epoch)
            attempt.done.add(rank)
            self._lock.notify_all()

    def _commit(self, attempt: Attempt, timeout: float, alive: Callable[[], bool]) -> int:
        """Waits for the other ranks' parts."""
        w, plan = self.weights, attempt.plan
        needed = set(plan.source_rank[plan.between(dest=self.rank)].tolist())
        w.until(lambda: needed <= attempt.done or w.ended(attempt.epoch), timeout, alive)
        if missing := needed - attempt.done:
            reason = f"rank(s) {sorted(missing)} have not written their part within {timeout:g} s"
            w.fail(attempt.epoch, reason)
            raise RefitError(f"commit: {reason}")
        w.current(attempt.epoch)
        self._fill_pads(attempt.slot)
        if self._committed is not None:
            self._committed(attempt.slot, attempt.version)
        version = w.commit(attempt.epoch)
        attempt.clock.cancel()
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
