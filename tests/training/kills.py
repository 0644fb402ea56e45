"""Saves that are killed, at each line and at random times: a program of its own, see test_checkpoint.py."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from fastrlhf.training import checkpoint
from fastrlhf.training.checkpoint import Checkpoints


def save(checkpoints: Checkpoints, step: int, size: int = 8) -> None:
    checkpoints.save(step, {"policy": {"w": torch.full((size,), float(step))}}, {"step": step})


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def fork(work: Callable[[], None]) -> int:
    """Runs in a child, which does not come back; its id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def killed(pid: int) -> bool:
    """Waits for a child: whether it was killed before it was done."""
    _, status = os.waitpid(pid, 0)
    assert status in (0, signal.SIGKILL), f"the child ended with status {status}"
    return status != 0


def check(directory: Path, newest: int) -> int:
    """The step of the latest checkpoint, which loads whole, is no older than what was complete, and warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        latest = Checkpoints(directory).latest()
    assert latest is not None
    tensors, state = Checkpoints(directory).load(latest)
    assert (tensors["policy"]["w"] == state["step"]).all() and state["step"] >= newest, (latest, state, newest)
    return int(state["step"])


def lines(directory: Path, replacing: bool, stride: int) -> None:
    """Every line (or every `stride`-th) of checkpoint.py that a save runs is the last one of some process; keep=1 leaves
    no margin."""
    seen: set[int] = set()
    for k in range(0, 10_000, stride):
        place = directory / str(k)
        save(Checkpoints(place, keep=1), 1)
        count = 0

        def trace(frame: FrameType, event: str, arg: object) -> Any:
            nonlocal count
            if frame.f_code.co_filename != checkpoint.__file__ or frame.f_code.co_name in ("_encode", "_decode"):
                return None
            count += event == "line"
            if count > k:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        def work() -> None:
            sys.settrace(trace)
            save(Checkpoints(place, keep=1), 1 if replacing else 2)

        was_killed = killed(fork(work))
        seen.add(check(place, 1))
        save(Checkpoints(place, keep=1), 3)
        assert names(place) == ["latest", "step-000003"], names(place)
        shutil.rmtree(place)
        if not was_killed:
            break
    assert k > 50 and seen == ({1} if replacing else {1, 2}), (k, seen)


def times(directory: Path) -> None:
    """Also inside safetensors and the system calls, where no line is."""
    rng = random.Random(0)
    step = leftovers = 0
    save(Checkpoints(directory), 0)

    def work() -> None:
        checkpoints = Checkpoints(directory, keep=1)
        for i in range(10_000):
            save(checkpoints, step + 1 + i, size=200_000)

    for attempt in range(300):
        if attempt >= 20 and leftovers > 3 and step > 5:
            break
        pid = fork(work)
        time.sleep(0.01 + rng.random() * 0.05)
        os.kill(pid, signal.SIGKILL)
        assert killed(pid)
        leftovers += any("tmp" in name for name in names(directory))
        step = check(directory, step)
    assert step > 5 and leftovers > 3, f"no save was interrupted, this tests nothing: {step}, {leftovers}"


if __name__ == "__main__":
    os.fsync = lambda descriptor: None  # type: ignore[assignment]  # a killed process loses nothing that it has written
    which, where, *rest = sys.argv[1:]
    if which == "lines":
        lines(Path(where), bool(int(rest[0])), int(rest[1]))
    else:
        times(Path(where))
