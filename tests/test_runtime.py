"""The extension as a thing: instruction sets, threads, forks, symbols."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import fastrlhf
import pytest
import torch
from fastrlhf import _cpu

PROGRAM = "import fastrlhf, torch; from fastrlhf import _cpu; print(_cpu.isa(), fastrlhf.logprobs(torch.zeros(1, 4), torch.tensor([1])).logprobs.item())"


def python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("isa", _cpu.isas())
def test_the_environment_forces_an_instruction_set(isa):
    out = python(PROGRAM, FASTRLHF_CPU_ISA=isa)
    assert out.stdout.split()[0] == isa, out.stderr


def test_an_unknown_instruction_set_is_an_error():
    out = python(PROGRAM, FASTRLHF_CPU_ISA="mmx")
    assert out.returncode != 0 and "'mmx' is not one of" in out.stderr
    with pytest.raises(ValueError, match="mmx"):
        _cpu.set_isa("mmx")


def test_the_environment_chooses_a_backend():
    program = "import sys, fastrlhf.ops, torch; sys.modules['fastrlhf.ops.logprobs'].native = None; print(fastrlhf.logprobs(torch.zeros(1, 4), torch.tensor([1])).logprobs.item())"
    assert python(program, FASTRLHF_BACKEND="reference").returncode == 0
    assert python(program).returncode != 0
    assert "FASTRLHF_BACKEND" in python(program, FASTRLHF_BACKEND="fast").stderr


def threads_of(program: str) -> int:
    out = python(program + "\nimport os; print(len(os.listdir('/proc/self/task')))")
    assert out.returncode == 0, out.stderr
    return int(out.stdout.split()[-1])


def test_threads_are_torchs_own():
    """Running our kernels beside torch's adds no thread: one pool, torch's."""
    torch_only = "import torch; torch.set_num_threads(2)\nx = torch.randn(64, 50000); (x @ x.t()).sum(); x.exp().sum(); torch.randn(8, 8)"
    with_ours = (
        torch_only
        + "\nimport fastrlhf\nfor _ in range(5): fastrlhf.logprobs(x, torch.zeros(64, dtype=torch.long)); x.exp().sum()"
    )
    assert threads_of(with_ours) <= threads_of(torch_only)


def test_threads_follow_torch():
    """One thread asked for: the process gets no other."""
    program = (
        "import torch; torch.set_num_threads(1); import fastrlhf, os\nx = torch.randn(64, 50000)\n"
        "before = len(os.listdir('/proc/self/task')); fastrlhf.logprobs(x, torch.zeros(64, dtype=torch.long))\n"
        "assert len(os.listdir('/proc/self/task')) == before"
    )
    assert python(program).returncode == 0


def test_fork():
    """A child of a process whose pool has run computes the same, with threads, and does not hang."""
    program = """
import os, torch, fastrlhf
x, y = torch.randn(64, 30000), torch.zeros(64, dtype=torch.long)
torch.set_num_threads(2)
parent = fastrlhf.logprobs(x, y).logprobs
read, write = os.pipe()
if os.fork() == 0:
    same = torch.equal(parent, fastrlhf.logprobs(x, y).logprobs)
    os.write(write, b'1' if same else b'0')
    os._exit(0)
assert os.read(read, 1) == b'1'
os.wait()
assert torch.equal(parent, fastrlhf.logprobs(x, y).logprobs)
print('forked')
"""
    assert "forked" in python(program).stdout


def test_many_python_threads():
    """The GIL is released, and calls from several threads at once do not disturb one another."""
    x, y = torch.randn(48, 20000), torch.randint(0, 20000, (48,))
    expected, wrong = fastrlhf.logprobs(x, y).logprobs, []

    def work() -> None:
        for _ in range(10):
            if not torch.equal(fastrlhf.logprobs(x, y).logprobs, expected):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


def shared_objects() -> list[Path]:
    return sorted(Path(_cpu.__file__).parent.glob("_c*.so"))


@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils not installed")
def test_no_symbol_of_torch():
    assert shared_objects()
    for path in shared_objects():
        symbols = subprocess.run(
            ["nm", "-D", "-C", "--undefined-only", path], capture_output=True, text=True, check=True
        ).stdout
        assert not re.search(r"\bc10::|\bat::|torch", symbols), path
        needed = subprocess.run(["objdump", "-p", path], capture_output=True, text=True, check=True).stdout
        assert not re.search(r"NEEDED.*(torch|c10|gomp|omp)", needed), path


def test_the_package_is_typed():
    assert (Path(fastrlhf.__file__).parent / "py.typed").exists()
