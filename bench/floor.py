"""This machine's ceilings, measured in the same process as everything else: how fast all threads together read memory
(a maximum over an array larger than the caches) and copy it."""

from __future__ import annotations

import time

import torch


def ceilings(megabytes: int = 512, rounds: int = 15) -> dict[str, float]:
    """Bytes a second. The best of the rounds: a ceiling is what the machine can do, not what it did at a bad moment."""
    x = torch.ones(megabytes * 2**18)
    y = torch.empty_like(x)
    best = {"read": 0.0, "copy": 0.0}
    for _ in range(rounds):
        for name, run, size in (("read", lambda: x.amax(), x.nbytes), ("copy", lambda: y.copy_(x), 2 * x.nbytes)):
            start = time.perf_counter()
            run()
            best[name] = max(best[name], size / (time.perf_counter() - start))
    return best
