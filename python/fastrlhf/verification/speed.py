"""Time and memory of two functions that do the same, called in turn."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

SECONDS = 1.0


def seconds(variants: dict[str, Callable[[], Any]], device: str) -> dict[str, float]:
    """Medians. The variants are called in turn, so that what slows the machine slows all."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run()
    deadline = time.perf_counter() + SECONDS * len(variants)
    while time.perf_counter() < deadline or min(map(len, times.values())) < 3:
        for name, run in variants.items():
            if len(times[name]) >= 3 and sum(times[name]) > 2 * SECONDS:
                continue
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            times[name].append(time.perf_counter() - start)
        if all(len(t) >= 3 and sum(t) > 2 * SECONDS for t in times.values()):
            break
    return {name: statistics.median(t) for name, t in times.items()}


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The profiler writes to the process's stderr, past Python's."""
    sys.stderr.flush()
    saved, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nothing)


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """The most that torch's allocator held over what it held before."""
    if torch.device(device).type == "cuda":
        _wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        _wait(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with _silence(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = peak = 0
    results = profile.profiler.kineto_results
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
