"""What an engine's weights are good for: the states of a refit, leases of those who generate, and versions.

    EMPTY -> SERVING(v) -> DRAINING -> REFITTING -> SERVING(v + 1)
                                               \\-> POISONED, the old weights overwritten and the new ones not whole

POISONED and EMPTY refuse to generate until a refit ends well. With two slots the old weights stay whole: a refit that fails
leads back to SERVING(v).
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
        self._committed = 0  # the last epoch that was
        self._aborted = self._kept = 0  # leases of before that epoch are
        self._leases = [0, 0]
        self._waiting = 0  # readers, for the refit under way to end
        self._changed = threading.Condition()

    # ------------------------------------------------------------------------------------------------------- generation

    def acquire(self, timeout: float | None = None) -> Lease:
        """Waits where a refit overwrites the only copy.

        Raises:
            Poisoned: the weights are not whole, or there are none.
            RefitError: a refit took longer than `timeout` seconds.
        """
        with self._changed:
            self._waiting += 1
            try:
                if not self._changed.wait_for(lambda: self._readable or self.state in (State.POISONED, State.EMPTY), timeout):
                    raise RefitError(f"weights: a refit has been under way for {timeout:g} s")
            finally:
                self._waiting -= 1
                self._changed.notify_all()
            return self._take()

    def step(self, lease: Lease) -> Lease:
        """Between two steps of a generation: the same lease, or, where the refit under way says so, one on other weights
        (mode keep, which waits for them) or an aborted one (mode abort, which has then been given back)."""
        with self._changed:
            if lease.epoch < self._aborted:
                self._give(lease)
                return replace(lease, aborted=True)
            if lease.epoch < self._kept and (self.slots == 1 or self.active != lease.slot):
                self._give(lease)
                self._changed.wait_for(lambda: self._readable or self.state in (State.POISONED, State.EMPTY))
                try:
                    return self._take()
                except Poisoned:
                    self._leases[lease.slot] += 1  # the caller still holds this one, and gives it back
                    raise
            return lease

    def release(self, lease: Lease) -> None:
        if lease.aborted:
            return
        with self._changed:
            self._give(lease)

    @property
    def _readable(self) -> bool:
        return self.state is State.SERVING or (self.slots == 2 and self.version >= 0 and self.state is not State.POISONED)

    def _take(self) -> Lease:
        if not self._readable:
            raise Poisoned(f"weights: {self.state.value}: {self.reason}; nothing is generated until a full refit succeeds")
        self._leases[self.active] += 1
        return Lease(self.active, self.version, self.epoch)

    def _give(self, lease: Lease) -> None:
        if not self._leases[lease.slot]:
            raise RuntimeError(f"lease: slot {lease.slot} has no readers; this one was given back before")
        self._leases[lease.slot] -= 1
        self._changed.notify_all()

    # ------------------------------------------------------------------------------------------------------------ refit

    def begin(
        self, epoch: int, version: int, mode: str = "drain", timeout: float | None = None, *, shared: bool = False,
        alive: Callable[[], bool] = lambda: True,
    ) -> int:  # fmt: skip
        """Starts an attempt: waits until nobody reads what it will write, and returns that slot.

        Args:
            shared: nothing will be written, the memory holds the new weights already: readers who go on or are ended between
                their steps need not be waited for.
            alive: whether whoever asked is still there; asked while waiting.

        Raises:
            StaleEpoch: an epoch that is not later than the last one's.
            RefitError: another attempt is under way; or nobody stopped reading within `timeout` seconds: nothing is changed.
        """
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {MODES}, got {mode!r}")
        if version < 0:
            raise ValueError(f"version: expected >= 0, got {version}")
        with self._changed:
            # who waited for the last refit has a turn before the next: refits that follow each other would starve readers
            self._changed.wait_for(lambda: not (self._waiting and self.state is State.SERVING), timeout)
            if self.state in (State.DRAINING, State.REFITTING):
                raise RefitError(f"weights: attempt {self.epoch} is under way")
            if epoch <= self.epoch:
                raise StaleEpoch(f"epoch: expected later than {self.epoch}, got {epoch}")
            before = self.state
            self.epoch, self.state = epoch, State.DRAINING
            if mode == "abort":
                self._aborted = epoch
            elif mode == "keep":
                self._kept = epoch
            waits = not (shared and mode != "drain")
            slot = self.active if self.slots == 1 or self.version < 0 else 1 - self.active
            self._changed.notify_all()
            end = float("inf") if timeout is None else time.monotonic() + timeout
            while waits and self._leases[slot] and self.state is State.DRAINING and self.epoch == epoch:
                left = end - time.monotonic()
                if left <= 0:
                    self._settle(before)
                    raise RefitError(
                        f"weights: {self._leases[slot]} reader(s) of slot {slot} did not stop within {timeout:g} s"
                    )
                self._changed.wait(min(left, 0.1))
                if not alive():
                    self._settle(before)
                    raise PeerLost("trainer: it is gone")
            if self.epoch != epoch or self.state is not State.DRAINING:
                raise StaleEpoch(f"epoch: attempt {epoch} was given up")
            self._target = (slot, version)
            self._settle(State.REFITTING)
            return slot

    def commit(self, epoch: int) -> int:
        """The weights are whole: they are served from now on. Returns their version."""
        with self._changed:
            self._check(epoch)
            self.active, self.version = self._target
            self._committed, self.reason = epoch, ""
            self._settle(State.SERVING)
            return self.version

    def fail(self, epoch: int, reason: str) -> State:
        """The attempt is over. With two slots what was served still is; else, once writing may have begun, POISONED."""
        with self._changed:
            if epoch != self.epoch or self.state not in (State.DRAINING, State.REFITTING):
                return self.state
            touched = self.state is State.REFITTING
            if (self.slots == 2 and self.version >= 0) or not touched:
                self._settle(State.SERVING if self.version >= 0 else State.EMPTY)
            else:
                self.reason = f"the refit to version {self._target[1]} failed: {reason}"
                self._settle(State.POISONED)
            return self.state

    def wait(self, states: tuple[State, ...], epoch: int, timeout: float) -> bool:
        """Until an attempt later than `epoch` is in one of the states."""
        end = time.monotonic() + timeout
        with self._changed:
            return self._changed.wait_for(lambda: self.epoch > epoch and self.state in states, end - time.monotonic())

    def spoil(self, reason: str) -> None:
        """What is served was overwritten outside of a refit: POISONED until one succeeds."""
        with self._changed:
            self.reason = reason
            self._settle(State.POISONED)

    def outcome(self, epoch: int, timeout: float) -> int:
        """Waits for the end of an attempt; the version that it committed.

        Raises:
            RefitError: it failed, was given up, or has not ended within `timeout` seconds.
        """
        with self._changed:
            under_way = (State.DRAINING, State.REFITTING)
            if not self._changed.wait_for(lambda: self.epoch != epoch or self.state not in under_way, timeout):
                raise RefitError(f"weights: attempt {epoch} has not ended within {timeout:g} s")
            if self._committed != epoch:
                raise RefitError(f"weights: attempt {epoch} failed: {self.reason or 'it was given up'}")
            return self.version

    def current(self, epoch: int) -> int:
        """The slot that the attempt under way writes.

        Raises:
            StaleEpoch: it is another one.
        """
        with self._changed:
            self._check(epoch)
            return self._target[0]

    def _check(self, epoch: int) -> None:
        if epoch != self.epoch or self.state is not State.REFITTING:
            raise StaleEpoch(f"epoch: {epoch} is not under way; the last is {self.epoch}, the state {self.state.value}")

    def _settle(self, state: State) -> None:
        self.state = state
        self._changed.notify_all()
