"""What an engine's weights are good for: the states of a refit, leases of those who generate, and versions.

    EMPTY -> SERVING(v) -> DRAINING -> REFITTING -> SERVING(v + 1)
                                               \\-> POISONED, the old weights overwritten and the new ones not whole

POISONED and EMPTY refuse to generate until a refit ends well. With two slots the old weights stay as they are: a refit that
fails leads back to the state before it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from ..errors import UserError

MODES = ("drain", "abort", "keep")


class State(Enum):
    EMPTY = "empty"
    SERVING = "serving"
    DRAINING = "draining"
    REFITTING = "refitting"
    POISONED = "poisoned"


class RefitError(UserError, RuntimeError):
    """A refit that did not take place; says what the engine holds now."""


class Poisoned(RefitError):
    """The engine's weights are not whole, or there are none: it refuses to generate until a full refit succeeds."""


class StaleEpoch(RefitError):
    """A message of an attempt that is not under way."""


class PeerLost(RefitError):
    """The process on the other side is gone, or did not answer in time."""


@dataclass(frozen=True)
class Lease:
    """The right to read a slot. `version` is that of the weights in it."""

    slot: int
    version: int
    epoch: int = 0  # of the last attempt that had begun when it was taken
    aborted: bool = False


class Weights:
    """The state of one engine's weights; its methods may be called from any thread.

    Args:
        slots: 1 where a refit overwrites what is served; 2 where it fills the other copy, which is then switched to.
        version: of the weights there are; None where there are none yet.
    """

    def __init__(self, slots: int = 1, version: int | None = None) -> None:
        if slots not in (1, 2):
            raise ValueError(f"slots: expected 1 or 2, got {slots}")
        self.slots = slots
        self.state = State.EMPTY if version is None else State.SERVING
        self.epoch = 0  # of the last attempt
        self.active, self.version = 0, -1 if version is None else version
        self.reason = "" if version is not None else "no weights have been loaded yet"
        self._target = (0, 0)  # (slot, version) of the attempt under way
        self._before = self.state  # that attempt
        self._committed = 0  # the last epoch that was
        self._aborted = self._kept = 0  # leases of before that epoch are
        self._leases = [0, 0]
        self._waiting = 0  # readers, for the refit under way to end
        self.changed = threading.Condition()  # who holds it sees no change; notified at each

    # ------------------------------------------------------------------------------------------------------- generation

    def acquire(self, timeout: float | None = None) -> Lease:
        """Waits where a refit overwrites the only copy.

        Raises:
            Poisoned: the weights are not whole, or there are none.
            RefitError: a refit took longer than `timeout` seconds.
        """
        with self.changed:
            self._waiting += 1
            try:
                if not self.changed.wait_for(lambda: self._readable or self.state in (State.POISONED, State.EMPTY), timeout):
                    raise RefitError(f"weights: a refit has been under way for {timeout:g} s")
            finally:
                self._waiting -= 1
                self.changed.notify_all()
            return self._take()

    def step(self, lease: Lease) -> Lease:
        """Between two steps of a generation: the same lease, or, where the refit under way says so, one on other weights
        (mode keep, which waits for them) or an aborted one (mode abort, which has then been given back)."""
        with self.changed:
            if lease.epoch < self._aborted:
                self._give(lease)
                return replace(lease, aborted=True)
            if lease.epoch < self._kept and (self.slots == 1 or self.active != lease.slot):
                self._give(lease)
                self.changed.wait_for(lambda: self._readable or self.state in (State.POISONED, State.EMPTY))
                try:
                    return self._take()
                except Poisoned:
                    self._leases[lease.slot] += 1  # the caller still holds this one, and gives it back
                    raise
            return lease

    def release(self, lease: Lease) -> None:
        if lease.aborted:
            return
        with self.changed:
            self._give(lease)

    @property
    def _readable(self) -> bool:
        whole = self._before if self._under_way and self.slots == 2 else self.state
        return whole is State.SERVING

    @property
    def _under_way(self) -> bool:
        return self.state in (State.DRAINING, State.REFITTING)

    def _take(self) -> Lease:
        if not self._readable:
            raise Poisoned(f"weights: {self.state.value}: {self.reason}; nothing is generated until a full refit succeeds")
        self._leases[self.active] += 1
        return Lease(self.active, self.version, self.epoch)

    def _give(self, lease: Lease) -> None:
        if not self._leases[lease.slot]:
            raise RuntimeError(f"lease: slot {lease.slot} has no readers; this one was given back before")
        self._leases[lease.slot] -= 1
        self.changed.notify_all()

    # ------------------------------------------------------------------------------------------------------------ refit

    def begin(
        self, epoch: int, version: int, mode: str = "drain", timeout: float | None = None, *, shared: bool = False,
        alive: Callable[[], bool] = lambda: True, admit: Callable[[], None] = lambda: None,
    ) -> int:  # fmt: skip
        """Starts an attempt: waits until nobody reads what it will write, and returns that slot.

        Args:
            shared: nothing will be written, the memory holds the new weights already: readers who go on or are ended between
                their steps need not be waited for.
            alive: whether whoever asked is still there; asked while waiting.
            admit: called when nothing but it stands in the attempt's way, with nothing changed yet; raises where it may not be.

        Raises:
            StaleEpoch: an epoch that is not later than the last one's.
            PeerLost: whoever asked is not alive.
            RefitError: another attempt is under way; or nobody stopped reading within `timeout` seconds: nothing is changed.
        """
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {MODES}, got {mode!r}")
        if version < 0:
            raise ValueError(f"version: expected >= 0, got {version}")
        with self.changed:
            # who waited for the last refit has a turn before the next: refits that follow each other would starve readers
            self.changed.wait_for(lambda: not (self._waiting and self.state is State.SERVING), timeout)
            if self._under_way:
                raise RefitError(f"weights: attempt {self.epoch} is under way")
            if epoch <= self.epoch:
                raise StaleEpoch(f"epoch: expected later than {self.epoch}, got {epoch}")
            admit()
            self.epoch, self._before = epoch, self.state
            slot = self.active if self.slots == 1 or self.version < 0 else 1 - self.active
            self._target = (slot, version)
            if mode == "abort":
                self._aborted = epoch
            elif mode == "keep":
                self._kept = epoch
            self._settle(State.DRAINING)
            if not (shared and mode != "drain"):
                self._drain(epoch, slot, timeout, alive)
            self._settle(State.REFITTING)
            return slot

    def _drain(self, epoch: int, slot: int, timeout: float | None, alive: Callable[[], bool]) -> None:
        """Until nobody reads the slot; else nothing has changed."""

        def given_up() -> bool:
            return self.epoch != epoch or self.state is not State.DRAINING

        try:
            if not self.until(lambda: given_up() or not self._leases[slot], timeout, alive):
                raise RefitError(f"weights: {self._leases[slot]} reader(s) of slot {slot} did not stop within {timeout:g} s")
        except BaseException:
            if not given_up():
                self._settle(self._before)
            raise
        if given_up():
            raise StaleEpoch(f"epoch: attempt {epoch} was given up")

    def until(self, ready: Callable[[], bool], timeout: float | None, alive: Callable[[], bool] = lambda: True) -> bool:
        """Waits for `ready`, which is asked at each change and under the lock; whether it came within `timeout` seconds.

        Raises:
            PeerLost: who waits is not `alive`.
        """
        end = float("inf") if timeout is None else time.monotonic() + timeout
        with self.changed:
            while not ready():
                left = end - time.monotonic()
                if left <= 0:
                    return False
                self.changed.wait(min(left, 0.1))
                if not alive():
                    raise PeerLost("trainer: it is gone")
            return True

    def commit(self, epoch: int) -> int:
        """The weights are whole: they are served from now on. Returns their version."""
        with self.changed:
            self._check(epoch)
            self.active, self.version = self._target
            self._committed, self.reason = epoch, ""
            self._settle(State.SERVING)
            return self.version

    def fail(self, epoch: int, reason: str, *, written: bool = True) -> State:
        """The attempt is over. What was served before still is where none of it was overwritten: with two slots, while the
        attempt waited for readers, or where nothing was `written`. Else POISONED."""
        with self.changed:
            if self.ended(epoch):
                return self.state
            if (self.slots == 2 and self.version >= 0) or self.state is State.DRAINING or not written:
                self._settle(self._before)
            else:
                self.reason = f"the refit to version {self._target[1]} failed: {reason}"
                self._settle(State.POISONED)
            return self.state

    def spoil(self, reason: str) -> None:
        """What is served was overwritten outside of a refit: POISONED until one succeeds."""
        with self.changed:
            self.reason = reason
            self._settle(State.POISONED)

    def outcome(self, epoch: int, timeout: float, alive: Callable[[], bool] = lambda: True) -> int:
        """Waits for the end of an attempt; the version that it committed.

        Raises:
            RefitError: it failed, was given up, or has not ended within `timeout` seconds.
        """
        with self.changed:
            if not self.until(lambda: self.ended(epoch), timeout, alive):
                raise RefitError(f"weights: attempt {epoch} has not ended within {timeout:g} s")
            if self._committed != epoch:
                raise RefitError(f"weights: attempt {epoch} failed: {self.reason or 'it was given up'}")
            return self.version

    def ended(self, epoch: int) -> bool:
        """Whether the attempt is over, one way or the other."""
        return self.epoch != epoch or not self._under_way

    def current(self, epoch: int) -> int:
        """The slot that the attempt under way writes.

        Raises:
            StaleEpoch: it is another one.
        """
        with self.changed:
            self._check(epoch)
            return self._target[0]

    def _check(self, epoch: int) -> None:
        if epoch != self.epoch or self.state is not State.REFITTING:
            raise StaleEpoch(f"epoch: {epoch} is not under way; the last is {self.epoch}, the state {self.state.value}")

    def _settle(self, state: State) -> None:
        self.state = state
        self.changed.notify_all()
