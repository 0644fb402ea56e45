"""States, leases and epochs, with threads as the readers and the writer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from fastrlhf.refit.session import Session, Transfer
from fastrlhf.refit.states import Lease, PeerLost, Poisoned, RefitError, StaleEpoch, State, Weights


def later(seconds: float, call: Callable[[], object]) -> threading.Thread:
    thread = threading.Timer(seconds, call)
    thread.daemon = True
    thread.start()
    return thread


def refit(w: Weights, epoch: int, version: int, mode: str = "drain") -> int:
    slot = w.begin(epoch, version, mode, 5)
    assert w.state is State.REFITTING
    w.commit(epoch)
    return slot


def test_nothing_is_read_before_the_first_refit() -> None:
    for slots in (1, 2):
        w = Weights(slots)
        with pytest.raises(Poisoned, match="empty: no weights have been loaded yet"):
            w.acquire()
        assert refit(w, 1, 5) == 0
        assert w.acquire() == Lease(0, 5, 1)


def test_one_slot_is_written_only_when_nobody_reads_it() -> None:
    w = Weights(1, version=0)
    lease = w.acquire()
    later(0.1, lambda: w.release(lease))
    started = time.monotonic()
    w.begin(1, 1, "drain", 5)
    assert time.monotonic() - started > 0.09
    later(0.1, lambda: w.commit(1))
    assert w.acquire(5).version == 1  # waited


def test_two_slots_serve_while_one_is_written() -> None:
    w = Weights(2, version=0)
    old = w.acquire()
    assert w.begin(1, 1, "drain", 5) == 1
    assert w.acquire() == Lease(0, 0, 1)
    w.commit(1)
    assert w.acquire() == Lease(1, 1, 1)
    assert w.step(old) == old
    with pytest.raises(RefitError, match=r"2 reader\(s\) of slot 0 did not stop within 0.05 s"):
        w.begin(2, 2, "drain", 0.05)
    assert w.state is State.SERVING and w.version == 1
    w.release(old)
    w.release(Lease(0, 0, 1))
    assert w.begin(3, 2, "drain", 5) == 0


@pytest.mark.parametrize("slots", [1, 2])
def test_abort_ends_who_reads_and_keep_moves_them_on(slots: int) -> None:
    w = Weights(slots, version=0)
    for epoch, mode in ((1, "abort"), (2, "keep"), (3, "abort"), (4, "keep")):
        lease = w.acquire()
        if slots == 1:
            later(0.02, lambda lease=lease, out=(out := []): out.append(w.step(lease)))
        w.begin(epoch, epoch, mode, 5)
        w.commit(epoch)
        if slots == 1:
            while not out:
                time.sleep(0.001)
            after = out[0]
        else:
            after = w.step(lease)
        assert after.aborted == (mode == "abort")
        if mode == "keep":
            assert after.version == epoch
            w.release(after)
        assert w._leases == [0, 0]


@pytest.mark.parametrize(("slots", "after"), [(1, State.POISONED), (2, State.SERVING)])
def test_a_failure_while_writing(slots: int, after: State) -> None:
    w = Weights(slots, version=3)
    w.begin(1, 4, "drain", 5)
    assert w.fail(1, "the writer died") is after
    if after is State.POISONED:
        with pytest.raises(Poisoned, match="the refit to version 4 failed: the writer died; nothing is generated until"):
            w.acquire()
    else:
        assert w.acquire() == Lease(0, 3, 1)
        w.release(Lease(0, 3, 1))
    refit(w, 2, 5)
    assert w.acquire().version == 5


def test_a_reader_whose_refit_failed_gives_its_lease_back_once() -> None:
    w = Weights(1, version=0)
    lease = w.acquire()
    w.begin(1, 1, "keep", 1, shared=True)
    failed = threading.Timer(0.1, w.fail, (1, "no"))
    failed.start()
    with pytest.raises(Poisoned):
        w.step(lease)
    w.release(lease)
    assert w.begin(2, 2, "drain", 1) == 0 and w.commit(2) == 2
    again = w.acquire()
    w.release(again)
    with pytest.raises(RuntimeError, match="given back before"):
        w.release(again)


def test_weights_overwritten_outside_of_a_refit() -> None:
    w = Weights(1, version=0)
    w.spoil("half a checkpoint")
    with pytest.raises(Poisoned, match="half a checkpoint"):
        w.acquire()
    w.begin(1, 1, "drain", 1)
    assert w.commit(1) == w.acquire().version == 1


@pytest.mark.parametrize("slots", [1, 2])
def test_an_attempt_that_is_given_up_makes_nothing_whole(slots: int) -> None:
    w = Weights(slots, version=0)
    w.spoil("half a checkpoint")
    w.begin(1, 1, "drain", 1)
    if slots == 2:
        with pytest.raises(RefitError, match="a refit has been under way for"):
            w.acquire(0.05)  # nor while it is under way
    assert w.fail(1, "gone", written=slots == 2) is State.POISONED
    with pytest.raises(Poisoned, match="half a checkpoint"):
        w.acquire()
    assert refit(w, 2, 2) == slots - 1 and w.acquire().version == 2


def test_an_attempt_that_waits_for_readers_of_spoiled_weights() -> None:
    w = Weights(1, version=0)
    w.acquire()
    w.spoil("half a checkpoint")
    with pytest.raises(RefitError, match="did not stop"):
        w.begin(1, 1, "drain", 0.05)
    assert w.state is State.POISONED
    later(0.05, lambda: w.fail(2, "gone"))
    with pytest.raises(StaleEpoch, match="given up"):
        w.begin(2, 1, "drain", 5)
    assert w.state is State.POISONED


def test_an_attempt_that_wrote_nothing_costs_nothing() -> None:
    for version, after in ((None, State.EMPTY), (3, State.SERVING)):
        w = Weights(1, version)
        w.begin(1, 4, "drain", 5)
        assert w.fail(1, "refused elsewhere", written=False) is after


def test_a_message_of_another_attempt_is_refused() -> None:
    w = Weights(2, version=0)
    w.begin(7, 1, "drain", 5)
    w.fail(7, "gone")
    for call in (lambda: w.commit(7), lambda: w.current(7), lambda: w.begin(7, 1), lambda: w.begin(6, 1)):
        with pytest.raises(StaleEpoch):
            call()
    w.begin(8, 2, "drain", 5)
    with pytest.raises(StaleEpoch):
        w.commit(7)
    assert w.fail(7, "late") is State.REFITTING  # nothing to this attempt
    with pytest.raises(RefitError, match="attempt 8 is under way"):
        w.begin(9, 3)
    assert w.commit(8) == 2


def test_an_attempt_that_is_given_up_while_it_waits() -> None:
    w = Weights(1, version=0)
    w.acquire()
    later(0.05, lambda: w.fail(1, "gone"))
    with pytest.raises(StaleEpoch, match="given up"):
        w.begin(1, 1, "drain", 5)
    assert w.state is State.SERVING


class Scripted:
    """A target that fails where it is told to."""

    def __init__(self, atomic: bool, fails: str = "", error: Exception | None = None) -> None:
        self.atomic, self.fails, self.error = atomic, fails, error or RefitError("no")
        self.calls: list[str] = []

    def _at(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails:
            raise self.error

    def begin(self, epoch: int, version: int, mode: str, timeout: float) -> None:
        self._at("begin")

    def transfer(self, epoch: int) -> Transfer:
        self._at("transfer")
        return Transfer(100, 2)

    def commit(self, epoch: int, version: int) -> None:
        self._at("commit")

    def fail(self, epoch: int, reason: str) -> None:
        self._at("fail")

    def close(self) -> None: ...


@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("fails", ["begin", "transfer", "commit"])
@pytest.mark.parametrize("error", [RefitError("no"), PeerLost("gone"), KeyboardInterrupt()])
def test_what_a_session_holds_after_a_failure(atomic: bool, fails: str, error: BaseException) -> None:
    target = Scripted(atomic)
    session = Session(target)
    with pytest.raises(Poisoned):
        session.require_serving()
    assert session.refit(1).copied == 200 and session.require_serving() == 1
    target.fails, target.error = fails, error  # type: ignore[assignment]
    with pytest.raises(type(error)):
        session.refit(2)
    whole = fails == "begin" or (atomic and not isinstance(error, PeerLost))
    assert session.state is (State.SERVING if whole else State.POISONED)
    if whole:
        assert session.require_serving() == 1
    else:
        with pytest.raises(Poisoned, match="refit 2 failed"):
            session.require_serving()
    assert target.calls[-1] == "fail"
    target.fails = ""
    assert session.refit(3).epoch == 3 and session.require_serving() == 3


def test_an_atomic_target_that_was_not_whole_before() -> None:
    target = Scripted(True, "transfer")
    session = Session(target, version=1)
    session.spoil("slept")
    with pytest.raises(RefitError):
        session.refit(2)
    assert session.state is State.POISONED


def test_bad_arguments_are_named() -> None:
    for call, message in (
        (lambda: Weights(3), "slots: expected 1 or 2, got 3"),
        (lambda: Weights(1).begin(1, 1, "now"), "mode: expected one of"),
        (lambda: Weights(1).begin(1, -1), "version: expected >= 0, got -1"),
        (lambda: Session(Scripted(True), mode="now"), "mode: expected one of"),
        (lambda: Session(Scripted(True), timeout=0), "timeout: expected > 0 s, got 0"),
        (lambda: Session(Scripted(True)).refit(-1), "version: expected >= 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
