"""Checkpoints of optimizers over processes: before a first step there are no moments to save or to ask for."""

from __future__ import annotations

import resource
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fastrlhf.errors import CheckpointError
from fastrlhf.parallel import ParallelGroups
from fastrlhf.training import checkpoint, sharded
from fastrlhf.training.checkpoint import Checkpoints
from fastrlhf.training.optim import Optimizer, OptimizerConfig
from fastrlhf.training.state import load_into
from fastrlhf.training.together import Together
from torch import Tensor, nn

from .processes import spawn


class TwoModels:
    """What a checkpoint needs of a policy that does not learn yet and a critic that does."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        groups = ParallelGroups.create()
        self.models = {
            name: {n: nn.Parameter(torch.randn(4, 3, generator=generator).to(dtype)) for n, dtype in dtypes.items()}
            for name, dtypes in (("policy", {"a": torch.float32, "b": torch.bfloat16}), ("critic", {"c": torch.float32}))
        }
        self.optimizers = {name: Optimizer(own, OptimizerConfig(lr=0.1), 10, groups) for name, own in self.models.items()}

    def step(self, name: str) -> None:
        for p in self.models[name].values():
            p.sum().backward()  # type: ignore[no-untyped-call]
        self.optimizers[name].step(name)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        weights: dict[str, dict[str, Tensor]] = {name: dict(own) for name, own in self.models.items()}
        return weights | {f"{name}_optimizer": o.save()[0] for name, o in self.optimizers.items()}

    def state(self) -> dict[str, Any]:
        return {name: o.save()[1] for name, o in self.optimizers.items()}

    def prepare(self, state: Mapping[str, Any]) -> None:
        for name, o in self.optimizers.items():
            o.prepare(state[name])

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        for name, o in self.optimizers.items():
            load_into(dict(self.models[name]), tensors[name])
            o.load(tensors[f"{name}_optimizer"], state[name])


def saved(rank: int, directory: str) -> None:
    algorithm = TwoModels()
    algorithm.step("critic")
    Together().save(Checkpoints(directory), 1, algorithm, {"algorithm": algorithm.state()}, {})


def refused(rank: int, directory: str) -> str:
    """The error of a save on a disk that has no room for the second process's part."""
    checkpoints = Checkpoints(directory)
    algorithm = TwoModels()
    Together().save(checkpoints, 1, algorithm, {"algorithm": algorithm.state()}, {})
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, resource.RLIM_INFINITY))
    with pytest.raises(CheckpointError) as error:
        Together().save(checkpoints, 2, algorithm, {"algorithm": algorithm.state()}, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return str(error.value)


def reads(rank: int, directory: str) -> tuple[list[str], list[str], str]:
    """The files that this process reads through while a checkpoint is saved, and while the latest is looked for; and that one,
    where a file of the last is damaged."""
    files: list[str] = []

    def counted(file: Path) -> int:
        files.append(file.relative_to(file.parents[1] if file.parent.name == sharded.SHARDS else file.parent).as_posix())
        return crc(file)

    crc = checkpoint.checksum
    checkpoint.checksum = sharded.checksum = counted
    algorithm, together = TwoModels(), Together()
    for step in (1, 2):
        together.save(Checkpoints(directory), step, algorithm, {"algorithm": algorithm.state()}, {})
    saved, files[:] = sorted({*files}), []
    assert together.latest(Checkpoints(directory)) == Path(directory, "step-000002")
    looked = sorted(files)
    together.barrier()
    if rank == 0:
        damaged = Path(directory, "step-000002", sharded.SHARDS, "__1_0.distcp")
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    together.barrier()
    with warnings.catch_warnings(record=True):
        return saved, looked, str(together.latest(Checkpoints(directory)))


class Other(TwoModels):
    def prepare(self, state: Mapping[str, Any]) -> None:
        self.optimizers["policy"].prepare(state["another"])


def resumed(rank: int, directory: str, touched: bool) -> list[Tensor]:
    """The weights after one more step of each model."""
    algorithm = TwoModels()
    if touched:
        algorithm.step("policy")
    checkpoints = Checkpoints(directory)
    path = checkpoints.latest()
    assert path is not None
    Together().load(checkpoints, path, algorithm)
    for name in algorithm.models:
        algorithm.step(name)
    return [p.detach().clone() for own in algorithm.models.values() for p in own.values()]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 2)])
def test_a_checkpoint_of_the_critics_warm_up_is_resumed(tmp_path: Path, before: int, after: int) -> None:
    directory = str(tmp_path)
    if before > 1:
        spawn(before, saved, directory)
    else:
        saved(0, directory)
    found = spawn(after, resumed, directory, True) if after > 1 else [resumed(0, directory, True)]
    reference = TwoModels()
    for name in ("critic", "policy", "critic"):  # of one process: a sum over two is clipped to the same gradient
        reference.step(name)
    expected = [p for own in reference.models.values() for p in own.values()]
    for weights in found:
        for a, b in zip(weights, expected, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-4, atol=1e-4)


def test_a_checkpoint_of_another_algorithm_is_refused(tmp_path: Path) -> None:
    spawn(2, saved, str(tmp_path))
    with pytest.raises(CheckpointError, match=r"step-000001: this is a checkpoint of another algorithm: .* no 'another'"):
        Together().load(Checkpoints(tmp_path), tmp_path / "step-000001", Other())


def test_a_full_disk_of_one_process_is_everyones_error(tmp_path: Path) -> None:
    texts = spawn(2, refused, str(tmp_path))
    assert texts[0] == texts[1]
    assert f"checkpoint of step 2 in {tmp_path} could not be saved" in texts[0] and "rank 1: OSError" in texts[0]
    assert f"the previous checkpoint {tmp_path / 'step-000001'} is intact" in texts[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-000001"]


def test_each_process_reads_its_share_of_a_checkpoint(tmp_path: Path) -> None:
    (saved0, looked0, left0), (saved1, looked1, left1) = spawn(2, reads, str(tmp_path))
    assert saved1 == ["shards/__1_0.distcp"]
    assert saved0 == ["rng.safetensors", "shards/.metadata", "shards/__0_0.distcp", "state.json"]
    assert sorted(looked0 + looked1) == sorted(saved0 + saved1) and min(len(looked0), len(looked1)) >= 2
    assert left0 == left1 == str(tmp_path / "step-000001")
