"""A trainer's refits of one engine: attempts with epochs, what is left where one fails, and what each of them took."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from .states import MODES, PeerLost, Poisoned, State

PHASES = ("begin", "transfer", "commit", "done")


class Transfer(NamedTuple):
    """What was moved: bytes in all, and how often each byte was copied."""

    nbytes: int
    copies: int


@dataclass(frozen=True)
class Refit:
    """`seconds` is from the request to the first token that could be drawn with the new weights; `copied` counts a byte as
    often as it was copied, so it is 0 where the memory is shared."""

    version: int
    epoch: int
    seconds: float
    nbytes: int
    copied: int

    def metrics(self) -> dict[str, float]:
        return {"refit/seconds": self.seconds, "refit/bytes": float(self.nbytes), "refit/bytes_copied": float(self.copied),
                "refit/version": float(self.version)}  # fmt: skip


class Target(Protocol):
    """An engine that can be refitted.

    `atomic`: what it served before is whole after an attempt that failed.
    """

    @property
    def atomic(self) -> bool: ...

    def begin(self, epoch: int, version: int, mode: str, timeout: float) -> None:
        """Stop generating, as `mode` says, and make ready to be written."""

    def transfer(self, epoch: int) -> Transfer:
        """Move the weights."""

    def commit(self, epoch: int, version: int) -> None:
        """Serve them: process what needs processing, forget what was cached with the old ones, generate again."""

    def fail(self, epoch: int, reason: str) -> None:
        """Give the attempt up. The engine may be gone."""

    def close(self) -> None: ...


class Session:
    """
    Args:
        mode: what becomes of running requests: drain lets them end, abort ends them as they are, keep lets them go on with
            the new weights, their old keys and values kept.
        timeout: seconds for each phase.
        phase: told of each phase as it begins.
    """

    def __init__(
        self, target: Target, *, mode: str = "drain", timeout: float = 600.0, version: int | None = None, epoch: int = 0,
        phase: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {MODES}, got {mode!r}")
        if not timeout > 0:
            raise ValueError(f"timeout: expected > 0 s, got {timeout}")
        self.target, self.mode, self.timeout = target, mode, timeout
        self.state = State.EMPTY if version is None else State.SERVING
        self.version = -1 if version is None else version
        self.epoch, self.reason = epoch, "no weights have been loaded yet"
        self.last: Refit | None = None
        self._phase = phase or (lambda _: None)

    def refit(self, version: int) -> Refit:
        """The engine serves the trainer's weights of now as `version` when this returns.

        Raises:
            RefitError: it does not; `state` says what it holds: SERVING the old version, or POISONED.
        """
        if version < 0:
            raise ValueError(f"version: expected >= 0, got {version}")
        started = time.perf_counter()
        self.epoch += 1
        epoch, before = self.epoch, self.state
        self.state = State.DRAINING
        try:
            self._phase("begin")
            self.target.begin(epoch, version, self.mode, self.timeout)
        except BaseException as error:
            self._give_up(error, before)
            raise
        self.state = State.REFITTING
        try:
            self._phase("transfer")
            moved = self.target.transfer(epoch)
            self._phase("commit")
            self.target.commit(epoch, version)
        except BaseException as error:
            whole = self.target.atomic and before is State.SERVING and not isinstance(error, PeerLost)
            self._give_up(error, State.SERVING if whole else State.POISONED)
            raise
        self.state, self.version = State.SERVING, version
        self._phase("done")
        self.last = Refit(version, epoch, time.perf_counter() - started, moved.nbytes, moved.nbytes * moved.copies)
        return self.last

    def require_serving(self) -> int:
        """The version that is served.

        Raises:
            Poisoned: nothing whole is.
        """
        if self.state in (State.POISONED, State.EMPTY):
            raise Poisoned(f"engine: {self.state.value}: {self.reason}; nothing is generated until a full refit succeeds")
        return self.version

    def spoil(self, reason: str) -> None:
        """The engine's weights are gone by other means, as an engine's sleep: POISONED until a refit."""
        self.state, self.reason = State.POISONED, reason

    def _give_up(self, error: BaseException, state: State) -> None:
        self.state = state
        if state is State.POISONED:
            self.reason = f"refit {self.epoch} failed: {error}"
        try:
            self.target.fail(self.epoch, str(error))
        except Exception as second:  # the first error is the one to raise
            self.state, self.reason = State.POISONED, f"refit {self.epoch} failed: {error}; and then: {second}"
