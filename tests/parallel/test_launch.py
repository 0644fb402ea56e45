"""What a launcher's variables say of a run."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from fastrlhf.errors import ConfigError
from fastrlhf.parallel.launch import processes, rank, start

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
TASK = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "3", "SLURM_JOB_ID": "5"}


@pytest.fixture(autouse=True)
def nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, *TASK, "SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.setenv(name, "")  # so that what is set in a test is undone after it
        monkeypatch.delenv(name)


def setenv(monkeypatch: pytest.MonkeyPatch, **env: str) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)


def test_a_task_of_srun_has_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    setenv(monkeypatch, **TASK, SLURM_STEP_NUM_TASKS="8", MASTER_ADDR="first")
    assert (processes(), rank()) == (8, 3)


@pytest.mark.parametrize("step", [{"SLURM_STEP_NUM_TASKS": "8"}, {"SLURM_STEP_ID": "0"}, {"SLURM_STEPID": "0"}])
def test_tasks_that_cannot_find_one_another_are_refused(monkeypatch: pytest.MonkeyPatch, step: dict[str, str]) -> None:
    setenv(monkeypatch, **TASK, **step)
    with pytest.raises(ConfigError, match="MASTER_ADDR: srun started 8 tasks"):
        processes()


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "0"}])
def test_a_batch_script_and_a_shell_are_one_process(monkeypatch: pytest.MonkeyPatch, step: dict[str, str]) -> None:
    setenv(monkeypatch, **TASK, **step)
    assert (processes(), rank()) == (1, 0)


@pytest.mark.parametrize(("devices", "expected"), [(1, 0), (4, 3)])
def test_the_device_is_among_those_that_are_seen(monkeypatch: pytest.MonkeyPatch, devices: int, expected: int) -> None:
    setenv(monkeypatch, RANK="3", WORLD_SIZE="8", LOCAL_RANK="3")
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    start(1.0)
    assert chosen == [expected]
