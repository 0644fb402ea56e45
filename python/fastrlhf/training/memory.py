"""The memory of a step: its peak, and freed memory kept for the next step instead of given back to the system."""

from __future__ import annotations

import ctypes
import platform

import torch

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed. By default glibc maps every large tensor anew and unmaps it when it dies; touching
    the pages again took 12 to 18 % of a training step on a CPU. Returns whether this system's malloc can."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1) and mallopt(_TOP_PAD, 64 << 20))


class PeakMemory:
    """The highest memory since it was last asked: on a GPU what torch had allocated there, otherwise the process's resident
    memory, from the system's own high-water mark."""

    def __init__(self) -> None:
        self.pop()

    def pop(self) -> dict[str, float]:
        """{"peak_memory_gb": 10^9 bytes} since the last call; {} where the system does not tell."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            return {"peak_memory_gb": peak / 1e9}
        try:
            with open("/proc/self/status") as f:
                peak = next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) * 1024
            with open("/proc/self/clear_refs", "w") as f:
                f.write("5")  # begin anew from where it is
        except (OSError, StopIteration):
            return {}
        return {"peak_memory_gb": peak / 1e9}
