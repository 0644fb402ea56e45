"""This machine's ceilings, measured in the same process as everything else: how fast all threads together read memory
(a maximum over an array larger than the caches) and copy it."""

from __future__ import annotations

import time

import torch

_arrays: list[torch.Tensor] = []


def once(writes: bool, megabytes: int = 256) -> float:
    """Bytes a second, reading or copying, the best of three: to be taken in turn with what it is the ceiling of."""
    if not _arrays:
        _arrays.extend((torch.ones(megabytes * 2**18), torch.ones(megabytes * 2**18)))
    x, y = _arrays
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        if writes:
            y.copy_(x)
        else:
            x.amax()
        best = max(best, x.nbytes * (1 + writes) / (time.perf_counter() - start))
    return best


def ceilings(rounds: int = 15) -> dict[str, float]:
    """The best of some rounds: what the machine can do, for the head of the report."""
    return {"read": max(once(False) for _ in range(rounds)), "copy": max(once(True) for _ in range(rounds))}
