"""Every test that takes `backend` runs on the reference and on the CPU kernels at each instruction set of this machine.
With `--kernels triton` (under TRITON_INTERPRET=1, or on a GPU) or `--kernels cuda` it runs on those kernels instead; where
there is no GPU, `cuda` is the same sources built for the host (tests/cuda_host)."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import fastrlhf
import pytest
import torch
from fastrlhf import _cpu
from fastrlhf.ops import backend as backends

ISAS = _cpu.isas()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kernels", choices=("cpu", "triton", "cuda"), default="cpu", help="whose kernels the ops tests run on")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "float64: computes in float64, which kernels on a GPU do not")
    config.addinivalue_line("markers", "cpu_only: of what has no kernel for a GPU, or does not concern it")
    use_kernels(config.getoption("--kernels"))


def use_kernels(kernels: str) -> None:
    """For the calls of this process that name no backend."""
    if kernels == "cpu":
        return
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests import interpreter

        interpreter.repair()
    backends._default = kernels
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
    elif kernels == "cuda":
        from tests.cuda_host import build

        backends.use_cuda_extension(build.module())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    kernels = metafunc.config.getoption("--kernels")
    names = [f"cpu-{isa}" for isa in ISAS] if kernels == "cpu" else [kernels]
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", ["reference", *names] if kernels == "cpu" else names, indirect=True)
    if "compiled" in metafunc.fixturenames:
        metafunc.parametrize("compiled", names, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--kernels") == "cpu":
        return
    for item in items:
        if item.get_closest_marker("float64"):
            item.add_marker(pytest.mark.skip(reason="kernels on a GPU compute in float32"))
        if item.get_closest_marker("cpu_only"):
            item.add_marker(pytest.mark.skip(reason="there is no such kernel for a GPU"))


def pytest_collection_finish() -> None:
    """What torch and the tests themselves are made of stays: looking through it for garbage took a tenth of the time."""
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Iterator[None]:
    """Tests that go through ops which have no CUDA kernel."""
    try:
        return (yield)
    except ValueError as error:
        if "cuda: this op has none" not in str(error):
            raise
        pytest.skip("an op here has no CUDA kernel")


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from _use(request.param)


@pytest.fixture
def compiled(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels only, not the reference."""
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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The figures that tests record: `record_property("figure", text)`."""
    for report in terminalreporter.getreports("passed"):
        for name, text in report.user_properties:
            if name == "figure":
                terminalreporter.write_line(f"{report.nodeid}: {text}")


def pytest_report_header() -> str:
    return f"fastrlhf {fastrlhf.__version__}, torch {torch.__version__}, instruction sets {ISAS}"
