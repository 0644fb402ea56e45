"""Tile sizes by kernel, architecture and size, from the table that ships beside this file (`python -m bench tune` writes
it on a GPU): nothing is tuned at run time. A row's tile may depend on the row's own size only, never on how many rows
there are, or its bits would depend on the batch."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("tiles.json")


@functools.cache
def table() -> dict[str, Any]:
    """{kernel: {"default" or "sm_90": [[largest size or null, {"BLOCK": ..., "num_warps": ...}], ...]}}"""
    return json.loads(TABLE.read_text())


_forced: str | None = None
_tried: dict[str, dict[str, int]] = {}


@contextlib.contextmanager
def chosen_for(architecture: str) -> Iterator[None]:
    """Within it tiles are those of `architecture` ("sm_90"), whatever the device: for compiling ahead of time."""
    global _forced
    before, _forced = _forced, architecture
    try:
        yield
    finally:
        _forced = before


@contextlib.contextmanager
def trying(kernel: str, choice: dict[str, int]) -> Iterator[None]:
    """Within it `kernel` has these constants, whatever the table says: for tuning."""
    _tried[kernel] = choice
    try:
        yield
    finally:
        del _tried[kernel]


@functools.cache
def architecture_of(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


@functools.cache
def _chosen(kernel: str, architecture: str, size: int) -> dict[str, int]:
    rows = table()[kernel]
    for largest, choice in rows.get(architecture, rows["default"]):
        if largest is None or size <= largest:
            return dict(choice)
    raise KeyError(f"tiles.json: no entry of {kernel} covers size {size}")


def tile(kernel: str, like: torch.Tensor, size: int) -> dict[str, int]:
    """The constants to launch `kernel` with for a row of `size` elements, on the device of `like`."""
    if kernel in _tried:
        return dict(_tried[kernel])
    architecture = _forced or (architecture_of(like.device.index or 0) if like.is_cuda else "default")
    return _chosen(kernel, architecture, size)
