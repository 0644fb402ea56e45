"""Timing on a GPU. Device time: events around calls that were enqueued while the device was still busy with something else,
so that neither the host nor the gaps between launches count; inputs rotate through more memory than the L2 cache holds;
variants of a case take turns. Host time: how long enqueueing one call takes, which is what a short op costs its caller."""

from __future__ import annotations

import gc
import itertools
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .harness import OURS, Case, quantiles, warm

CYCLES_PER_SECOND = 2e9  # of the busy loop: at or above any GPU's clock
LARGEST_BACKLOG = 0.05
Inputs = tuple[Tensor, ...]


class DeviceLost(RuntimeError):
    """A kernel went wrong in a way that leaves this process without its GPU."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        super().__init__("the device is lost to this process")
        self.rows = rows


class Rotation:
    """Input sets, used in turn, that together are four times as large as the L2 cache."""

    def __init__(self, make: Callable[[], Inputs]) -> None:
        self.first = make()
        sets = [self.first]
        size = sum(t.nbytes for t in self.first)
        if self.first[0].is_cuda:
            cache = torch.cuda.get_device_properties(self.first[0].device).L2_cache_size
            sets += [make() for _ in range(min(511, -(-4 * cache // size)) if size < 4 * cache else 0)]
        self.take = itertools.cycle(sets).__next__


def ceilings(device: torch.device, megabytes: int = 2048) -> dict[str, float]:
    """Bytes a second of a large copy, read and write counted, and of a large reduction; bf16 operations a second of a
    matrix product. `read` is the better of the two rates: a reduction of torch's may be short of what can be read."""
    moved = _memory(device, megabytes)
    n = 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    matmul = 2 * n**3 / _best(lambda: a @ b)
    return {"read": max(moved.values()), **moved, "bf16_matmul": matmul}


def _memory(device: torch.device, megabytes: int) -> dict[str, float]:
    x = torch.randn(megabytes * 2**18, device=device)
    y = torch.empty_like(x)
    return {"copy": 2 * x.nbytes / _best(lambda: y.copy_(x)), "reduction": x.nbytes / _best(lambda: x.amax())}


def _best(run: Callable[[], Any]) -> float:
    for _ in range(3):
        run()
    return min(sample(run, 4, 1e-3)[0] for _ in range(10))


def sample(run: Callable[[], Any], calls: int, backlog: float) -> tuple[float, float]:
    """Seconds of one call on the device, and to enqueue one."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(int(backlog * CYCLES_PER_SECOND))
    start.record()
    began = time.perf_counter()
    for _ in range(calls):
        run()
    enqueued = time.perf_counter() - began
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls, enqueued / calls


def plan(run: Callable[[], Any]) -> tuple[int, float]:
    """How many calls to time together, and how long the device must be busy meanwhile: longer than the host takes."""
    device, host = min(sample(run, 1, 0) for _ in range(3))
    calls = max(1, min(8, int(1e-4 / max(device, 1e-7))))
    return calls, min(LARGEST_BACKLOG, 2 * host * calls + 5e-5)


def measure(case: Case, seconds: float, limits: dict[str, float]) -> list[dict[str, Any]]:
    """One row a variant: the device time's median and p20/p80, the host's, GB/s, share of the floor, ratio to the first of
    ours that runs, memory, error."""
    running, broken = warm(case)
    device_times: dict[str, list[float]] = {n: [] for n in running}
    host_times: dict[str, list[float]] = {n: [] for n in running}
    plans = {name: plan(variant.run) for name, variant in running.items()}
    deadline = time.perf_counter() + seconds * len(running)
    while running and (time.perf_counter() < deadline or min(map(len, device_times.values())) < 5):
        for name, variant in running.items():
            if len(device_times[name]) >= 5 and sum(device_times[name]) > 2 * seconds:
                continue  # far slower than the rest
            device, host = sample(variant.run, *plans[name])
            device_times[name].append(device)
            host_times[name].append(host)
    ceiling = limits["copy" if case.writes else "read"]
    first = next((n for n in running if n.startswith(OURS)), None)
    ours = statistics.median(device_times[first]) if first else float("nan")
    exact = case.oracle() if case.oracle else None
    rows = []
    for name, variant in case.variants.items():
        row: dict[str, Any] = {"op": case.op, "case": case.name, "variant": name}
        if name in broken:
            rows.append(row | {"skipped": broken[name]})
            continue
        row |= quantiles(device_times[name])
        row |= {"host_s": statistics.median(host_times[name]), "slower_than_ours": row["median_s"] / ours}
        floor = variant.floor_bytes or case.floor_bytes
        if floor:
            row |= {"floor_bytes": floor, "GB_per_s": floor / row["median_s"] / 1e9, "ceiling_GB_per_s": ceiling / 1e9}
            row["of_floor"] = floor / ceiling / row["median_s"]
        operations = variant.floor_operations or case.floor_operations
        if operations:
            rate = limits["bf16_matmul"]
            row |= {"floor_operations": operations, "TFLOP_per_s": operations / row["median_s"] / 1e12}
            row |= {"ceiling_TFLOP_per_s": rate / 1e12, "of_floor": operations / rate / row["median_s"]}
        row["peak_extra_bytes"] = peak_extra_bytes(variant.run)
        if exact is not None and variant.value is not None:
            value = variant.value().detach().to(exact.device).double()
            row["max_error"] = float((value - exact).abs().max())
        rows.append(row)
    case.after()
    return rows


def measure_or_say_why(case: Case, seconds: float, limits: dict[str, float]) -> list[dict[str, Any]]:
    """`measure`, where what goes wrong becomes the rows' text; DeviceLost, with these rows, if nothing can follow."""
    try:
        rows = measure(case, seconds, limits)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"[:200]
        rows = [{"op": case.op, "case": case.name, "variant": name, "skipped": text} for name in case.variants]
    try:
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
    except Exception as error:
        raise DeviceLost(rows) from error
    return rows


def peak_extra_bytes(run: Callable[[], Any]) -> int:
    """How far the allocated memory rises above what was allocated before the call; results count."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def describe(device: torch.device) -> dict[str, Any]:
    """For the head of the report."""
    p = torch.cuda.get_device_properties(device)
    return {
        "gpu": p.name, "sm": f"sm_{p.major}{p.minor}", "multiprocessors": p.multi_processor_count, "l2_bytes": p.L2_cache_size,
        "memory_bytes": p.total_memory, "driver": _driver(), "cuda": torch.version.cuda,
    }  # fmt: skip


def _driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split()[0]
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return "unknown"
