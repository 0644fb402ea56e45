"""Timing on a shared, noisy machine: every variant of a case is called in turn, again and again, in one process, so that
what slows one slows all; figures are ratios within the case."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .floor import once

OURS = "fastrlhf"


@dataclass
class Variant:
    """`run` is what is timed; it returns what it makes and leaves nothing behind. `value` gives what is compared with the
    case's oracle, of the same inputs."""

    run: Callable[[], Any]
    value: Callable[[], Tensor] | None = None
    floor_bytes: float | None = None  # where it differs from the case's
    floor_operations: float | None = None


@dataclass
class Case:
    op: str
    name: str
    variants: dict[str, Variant]
    floor_bytes: float = 0  # what must cross the memory bus at the least; 0: does not apply
    floor_operations: float = 0  # of bfloat16 matrix products, in place of bytes; on a GPU
    oracle: Callable[[], Tensor] | None = None
    writes: bool = False  # the floor is at copy speed, not at read speed
    after: Callable[[], None] = field(default=lambda: None)  # frees the inputs


def measure(case: Case, seconds: float, peaks: dict[str, list[int]], samples: int = 3) -> list[dict[str, Any]]:
    """One row a variant: median and p20/p80 in seconds, GB/s, share of the floor (what the memory allowed in the same rounds),
    ratio to ours, peak (`memory.peaks`), error."""
    running, broken = warm(case)
    times: dict[str, list[float]] = {n: [] for n in running}
    ceiling: list[float] = []
    deadline = time.perf_counter() + seconds * len(running)
    while time.perf_counter() < deadline or min(map(len, times.values())) < samples:
        if case.floor_bytes:
            ceiling.append(once(case.writes))
        for name, variant in running.items():
            if times[name] and sum(times[name]) > 3 * seconds and len(times[name]) >= samples:
                continue  # far slower than the rest: so few samples will do
            calls = _repeats(times[name])
            start = time.perf_counter()
            for _ in range(calls):
                variant.run()
            times[name].append((time.perf_counter() - start) / calls)
    exact = case.oracle() if case.oracle else None
    ours = statistics.median(times[OURS]) if OURS in times else float("nan")
    rows = []
    for name, variant in case.variants.items():
        row: dict[str, Any] = {"op": case.op, "case": case.name, "variant": name}
        if name in broken:
            rows.append(row | {"skipped": broken[name]})
            continue
        median = statistics.median(times[name])
        row |= {**quantiles(times[name]), "slower_than_ours": median / ours}
        if case.floor_bytes:
            row["GB_per_s"] = case.floor_bytes / median / 1e9
            row["of_floor"] = case.floor_bytes / statistics.median(ceiling) / median
            row["ceiling_GB_per_s"] = statistics.median(ceiling) / 1e9
        if name in peaks:
            row["peak_extra_bytes"], row["result_bytes"] = peaks[name]
        if exact is not None and variant.value is not None:
            value = variant.value().detach().double()
            row["max_error"] = float((value - exact).abs().max())
        rows.append(row)
    case.after()
    gc.collect()
    return rows


def warm(case: Case) -> tuple[dict[str, Variant], dict[str, str]]:
    """Every variant once, which compiles it: those that ran, and why the others did not."""
    broken = {}
    for name, variant in case.variants.items():
        try:
            variant.run()
        except Exception as error:
            broken[name] = f"{type(error).__name__}: {error}"[:200]
    return {n: v for n, v in case.variants.items() if n not in broken}, broken


def quantiles(times: list[float]) -> dict[str, Any]:
    ordered = sorted(times)
    return {
        "median_s": statistics.median(ordered),
        "p20_s": ordered[int(0.2 * (len(ordered) - 1))],
        "p80_s": ordered[int(0.8 * (len(ordered) - 1))],
        "samples": len(ordered),
    }


def _repeats(times: list[float]) -> int:
    """Calls in one sample: enough to see above the clock."""
    return 1 if not times or times[-1] > 1e-3 else min(200, int(2e-3 / max(times[-1], 1e-7)) + 1)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


@contextlib.contextmanager
def quiet() -> Any:
    import logging
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        yield
        logging.disable(logging.NOTSET)
