"""One engine rank's host and trainers of it, in one process: whose an attempt is, and how it ends."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import pytest
import torch
from fastrlhf import _cpu
from fastrlhf.refit import PlanError, RefitError, Session, StaleEpoch, State, Weights
from fastrlhf.refit.catalogue import Builder, Catalogue
from fastrlhf.refit.host import Host
from fastrlhf.refit.memory import Places
from fastrlhf.refit.transports.posix_shm import PosixShm
from fastrlhf.refit.wire import Channel

ROWS, COLS = 8, 4


def halves(ranks: int) -> Catalogue:
    """One tensor, shared out by rows."""
    builder = Builder(ranks)
    for rank in range(ranks):
        n = ROWS // ranks
        t = builder.tensor("w", ROWS, COLS, "float32")
        builder.put(t, rank * n, 0, n, COLS, builder.param(rank, "w", n, COLS, "float32"))
    return builder.build()


class Engine:
    def __init__(self, slots: int, version: int | None = None) -> None:
        dest = halves(1)
        _, self.size = Places.in_arena(dest, 0, 0)
        self.weights, self.arena = Weights(slots, version), _cpu.Arena(self.size * slots)
        self.host = Host(dest, self.weights, self.arena)

    def connect(self) -> Channel:
        ours, theirs = socket.socketpair()
        threading.Thread(target=self.host.serve, args=(Channel(theirs, "trainer"),), daemon=True).start()
        return Channel(ours, "engine")

    def trainer(self, fill: float, rank: int = 0, ranks: int = 1) -> PosixShm:
        tensors = {"w": torch.full((ROWS // ranks, COLS), fill)}
        return PosixShm([self.connect()], halves(ranks), tensors, rank=rank, verify=True, threads=1)

    def rows(self) -> list[float]:
        """The first column of what is served."""
        lease = self.weights.acquire(1)
        slot = torch.frombuffer(self.arena, dtype=torch.float32, offset=lease.slot * self.size, count=ROWS * COLS)
        self.weights.release(lease)
        return slot.view(ROWS, COLS)[:, 0].tolist()


def until(what: Any, seconds: float = 1) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.005)


def test_a_trainer_that_only_connects_changes_no_attempt() -> None:
    engine = Engine(2)
    ranks = [engine.trainer(10.0 + r, r, 2) for r in range(2)]
    ranks[0].begin(1, 1, "drain", 0.5)
    ranks[0].transfer(1)
    engine.trainer(99.0)  # says hello, and agrees on a plan by which one rank is enough
    with pytest.raises(RefitError, match=r"rank\(s\) \[1\] have not written their part"):
        ranks[0].commit(1, 1)
    ranks[0].fail(1, "half of it")
    ranks[0].begin(2, 2, "drain", 5)
    ranks[1].begin(2, 2, "drain", 5)
    engine.trainer(99.0)
    for r in ranks:
        r.transfer(2)
    ranks[0].commit(2, 2)
    assert engine.rows() == [10.0] * 4 + [11.0] * 4


def test_an_attempt_has_one_plan() -> None:
    engine = Engine(2)
    leader, other = engine.trainer(1.0, 0, 2), engine.trainer(2.0)
    leader.begin(1, 1, "drain", 5)
    other.rank = 1  # as if it were a rank of the same trainer
    with pytest.raises(PlanError, match="join: attempt 1 has another plan"):
        other.begin(1, 1, "drain", 5)
    message = {"kind": "plan", "source": {}, "digest": "", "ignore": []}
    with pytest.raises(RefitError, match="plan: attempt 1 of this connection is under way"):
        leader._engines[0].ask(message, 5)
    with pytest.raises(StaleEpoch):
        other.transfer(1)


def test_a_leader_that_is_lost_while_its_commit_waits() -> None:
    engine = Engine(2, version=0)
    ranks = [engine.trainer(10.0 + r, r, 2) for r in range(2)]
    for r in ranks:
        r.begin(1, 1, "drain", 60)
    ranks[0].transfer(1)
    commit = {"kind": "commit", "epoch": 1, "timeout": 60}
    ranks[0].channels[0].send(commit)
    time.sleep(0.1)
    ranks[0].close()
    until(lambda: engine.weights.state is State.SERVING)
    with pytest.raises(RefitError):
        ranks[1].transfer(1)  # not in an attempt that is over
    ranks[1].fail(1, "over")
    alone = engine.trainer(7.0)
    alone.begin(2, 2, "drain", 5)
    alone.transfer(2)
    alone.commit(2, 2)
    assert engine.rows() == [7.0] * 8


def test_a_commit_stops_its_own_clock_only(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(2, version=0)
    one, two = engine.trainer(1.0), engine.trainer(2.0)
    one.begin(1, 1, "drain", 60)
    one.transfer(1)
    commit = engine.weights.commit

    def then_another(epoch: int) -> int:
        version = commit(epoch)
        two.begin(2, 2, "drain", 0.3)
        return version

    monkeypatch.setattr(engine.weights, "commit", then_another)
    one.commit(1, 1)
    assert engine.weights.state is State.REFITTING
    until(lambda: engine.weights.state is State.SERVING)


def test_a_rank_that_joins_as_the_attempt_ends_is_one_that_may_write() -> None:
    """The end waits until it is among those who write, so that nobody begins another attempt beside it."""
    engine = Engine(2, version=0)
    leader, rank, other = engine.trainer(1.0, 0, 2), engine.trainer(1.0, 1, 2), engine.trainer(2.0)

    class Slow(set):  # type: ignore[type-arg]
        def add(self, visit: Any) -> None:
            end = threading.Thread(target=engine.weights.fail, args=(1, "over"))
            end.start()
            end.join(0.2)
            super().add(visit)

    leader.begin(1, 1, "drain", 5)
    leader.transfer(1)
    engine.host._writing = Slow(engine.host._writing)
    rank.begin(1, 1, "drain", 5)
    until(lambda: engine.weights.state is State.SERVING)
    with pytest.raises(RefitError, match="whoever wrote attempt 1 has not said that it is done"):
        other.begin(2, 2, "drain", 5)


def test_an_engine_rank_that_refuses_spoils_none_of_the_others() -> None:
    engines = [Engine(1, version=0) for _ in range(2)]
    tensors = {"w": torch.ones(ROWS, COLS)}
    target = PosixShm([e.connect() for e in engines], halves(1), tensors, threads=1)
    session = Session(target, version=0, timeout=5)
    other = engines[1].trainer(2.0)
    other.begin(1, 1, "drain", 5)
    with pytest.raises(RefitError, match="attempt 1 is under way"):
        session.refit(1)
    assert engines[0].weights.state is State.SERVING and session.state is State.SERVING  # it began, and nothing was written
    other.transfer(1)
    other.commit(1, 1)
    assert session.refit(2).version == 2
    # in the middle: what was written is not whole, what was not still is
    target.begin(5, 3, "drain", 5)
    target._engines[0].copy(False, 1)
    target.fail(5, "no")
    assert [e.weights.state for e in engines] == [State.POISONED, State.SERVING]


def test_what_one_rank_says_was_not_written_another_may_have() -> None:
    engine = Engine(1, version=0)
    ranks = [engine.trainer(1.0, r, 2) for r in range(2)]
    for r in ranks:
        r.begin(1, 1, "drain", 5)
    ranks[0].fail(1, "no")
    assert engine.weights.state is State.POISONED  # the other is still there


def test_an_engine_that_is_gone_keeps_nobody_from_telling_the_others() -> None:
    engines = [Engine(2, version=0) for _ in range(2)]
    target = PosixShm([e.connect() for e in engines], halves(1), {"w": torch.ones(ROWS, COLS)}, threads=1)
    target.begin(1, 1, "drain", 60)
    target.channels[0].close()
    with pytest.raises(RefitError, match="it is gone"):
        target.fail(1, "no")
    assert engines[1].weights.state is State.SERVING
