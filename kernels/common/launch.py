"""The one way a Triton kernel is launched, so that what would run can also be recorded and compiled ahead of time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

Recorder = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]
_recorder: Recorder | None = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """`kernel[grid](*args, **meta)`. An empty grid launches nothing."""
    if _recorder is not None:
        _recorder(kernel, grid, args, meta)
    elif all(grid):
        kernel[grid](*args, **meta)


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Within it launches are handed to `recorder(kernel, grid, args, meta)` and nothing runs."""
    global _recorder
    before, _recorder = _recorder, recorder
    try:
        yield
    finally:
        _recorder = before
