"""Every test that takes `backend` runs on the reference and on the CPU kernels at each instruction set of this machine."""

from __future__ import annotations

from collections.abc import Iterator

import fastrlhf
import pytest
import torch
from fastrlhf import _cpu

ISAS = _cpu.isas()
BACKENDS = ["reference", *(f"cpu-{isa}" for isa in ISAS)]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from _use(request.param)


@pytest.fixture(params=BACKENDS[1:])
def cpu(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU kernels only."""
    yield from _use(request.param)


def _use(name: str) -> Iterator[str]:
    before = _cpu.isa()
    if "-" in name:
        _cpu.set_isa(name.split("-")[1])
    yield name.split("-")[0]
    _cpu.set_isa(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_report_header() -> str:
    return f"fastrlhf {fastrlhf.__version__}, torch {torch.__version__}, instruction sets {ISAS}"
