"""Joining the processes that torchrun or SLURM started."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from ..errors import ConfigError


def processes() -> int:
    """How many this run has, as its launcher says."""
    _from_slurm()
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Of this process, as its launcher says."""
    _from_slurm()
    return int(os.environ.get("RANK", "0"))


def start(timeout: float) -> None:
    """Join the others: NCCL for what is on GPUs, each process its own, and gloo for the rest. Nothing for one process.

    Args:
        timeout: seconds that an exchange may take.
    """
    if dist.is_initialized() or processes() == 1:
        return
    backend = "gloo"
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local % torch.cuda.device_count())  # a launcher may show each process its own device alone
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))


def _from_slurm() -> None:
    """`srun` without torchrun: its variables under the names that torch reads.

    Raises:
        ConfigError: several tasks of one step that do not know where the first one is.
    """
    env = os.environ
    if "RANK" in env or "SLURM_PROCID" not in env or int(env.get("SLURM_NTASKS", "1")) == 1:
        return
    if "MASTER_ADDR" not in env:
        step = "SLURM_STEP_ID" in env or "SLURM_STEPID" in env  # a batch script has tasks, and is one process
        tasks = int(env.get("SLURM_STEP_NUM_TASKS", env["SLURM_NTASKS"] if step else "1"))
        if tasks > 1:
            raise ConfigError(
                f"MASTER_ADDR: srun started {tasks} tasks and this variable, the first one's host, is not set (docs/scaling.md)"
            )
        return
    for name, slurm in (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_NTASKS"), ("LOCAL_RANK", "SLURM_LOCALID")):
        env[name] = env[slurm]
    env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))
