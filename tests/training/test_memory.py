"""Freed tensors are reused: the second touch of their memory costs no page faults. A step's peak is its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

SCRIPT = """
import resource, torch
from fastrlhf.training.memory import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.empty(16 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
usual = faults()
assert keep_freed_memory()
faults()
print(usual, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this malloc has no such options")
def test_freed_memory_is_used_again() -> None:
    out = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
    usual, kept = map(int, out.split())
    assert kept < 100 < usual or usual <= 100  # where huge pages serve them there is little to save


PEAKS = """
import torch
from fastrlhf.training.memory import PeakMemory
memory = PeakMemory()
before = memory.pop()["peak_memory_gb"]
torch.ones(50_000_000)
print(before, memory.pop()["peak_memory_gb"], memory.pop()["peak_memory_gb"])
"""


@pytest.mark.skipif(torch.cuda.is_available() or platform.system() != "Linux", reason="resident memory is not what is told")
def test_peak_of_each_step() -> None:
    out = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True).stdout
    before, during, after = map(float, out.split())
    assert during > before + 0.19 > after
