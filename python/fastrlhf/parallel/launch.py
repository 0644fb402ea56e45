"""Joining the processes that torchrun or SLURM started."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist


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
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))


def _from_slurm() -> None:
    """`srun` without torchrun: its variables under the names that torch reads."""
    env = os.environ
    if "RANK" in env or "SLURM_PROCID" not in env or int(env.get("SLURM_NTASKS", "1")) == 1 or "MASTER_ADDR" not in env:
        return
    for name, slurm in (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_NTASKS"), ("LOCAL_RANK", "SLURM_LOCALID")):
        env[name] = env[slurm]
    env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))
