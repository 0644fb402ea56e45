"""Seconds and tokens of each phase of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Timers:
    """Where a step's time goes::

        timers = Timers()
        with timers("generate", tokens=4096):
            ...
        timers.pop()  # {"seconds/generate": ..., "tokens_per_second/generate": ..., "seconds/step": ...}

    A phase inside another stops the outer one's clock, so that the phases of a step add up to no more than the step.

    Args:
        synchronize: called at both ends of a phase, as `torch.cuda.synchronize`, so that what a device still does counts
            where it was asked for; None where that is not worth the wait.
        clock: seconds, for tests.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._synchronize = synchronize
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._tokens: dict[str, float] = {}
        self._open: list[str] = []
        self._mark = self._start = clock()

    @contextmanager
    def __call__(self, phase: str, tokens: float | None = None) -> Iterator[None]:
        """Counts the time of its body, also when it raises, to a phase; phases of one name add up."""
        self._charge()
        self._open.append(phase)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()
        if tokens is not None:
            self.count(phase, tokens)

    def count(self, phase: str, tokens: float) -> None:
        """Adds to a phase's tokens, where they are known only after it."""
        self._tokens[phase] = self._tokens.get(phase, 0) + tokens

    def pop(self) -> dict[str, float]:
        """The metrics since the last call: `seconds/<phase>`, `tokens_per_second/<phase>` where tokens were counted, and
        `seconds/step`, all there was; starts again from nothing."""
        self._charge()
        metrics = {f"seconds/{phase}": s for phase, s in self._seconds.items()}
        metrics |= {
            f"tokens_per_second/{phase}": n / self._seconds[phase]
            for phase, n in self._tokens.items()
            if self._seconds.get(phase, 0) > 0
        }
        metrics["seconds/step"] = self._mark - self._start
        self._seconds, self._tokens, self._start = {}, {}, self._mark
        return metrics

    def _charge(self) -> None:
        """Gives the time since the last mark to the innermost phase."""
        if self._synchronize is not None:
            self._synchronize()
        now = self._clock()
        if self._open:
            phase = self._open[-1]
            self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._mark
        self._mark = now
