"""What a loop tells whoever watches it; the command line's console is one implementation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol


class Phase(Protocol):
    """A part of a step that is under way."""

    def advance(self, n: float = 1) -> None:
        """n more of the phase's total are done."""


class Progress(Protocol):
    """A loop's view of its audience. Every call returns at once."""

    def stage(self, name: str, total_steps: int | None) -> None:
        """A stage such as `sft` or `ppo` begins; steps count to `total_steps`, None for as long as it takes."""

    def phase(self, name: str, total: float | None = None) -> AbstractContextManager[Phase]:
        """A part of the step, as `generate`, for the length of the `with` block."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done."""

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Completions worth a look: prompt, completion, reward and what else a row has."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A result."""

    def message(self, text: str) -> None:
        """One line to read."""

    def close(self) -> None:
        """Nothing more comes."""


class _SilentPhase:
    def advance(self, n: float = 1) -> None:
        pass


class Silent:
    """A `Progress` that shows nothing: tests, and all ranks but the first."""

    def stage(self, name: str, total_steps: int | None) -> None:
        pass

    @contextmanager
    def phase(self, name: str, total: float | None = None) -> Iterator[Phase]:
        yield _SilentPhase()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        pass

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass
