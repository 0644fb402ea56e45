"""What the processes of a run decide and do as one: who writes, when to stop, how to save, what to raise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch.distributed as dist
from torch import Tensor

from ..errors import CheckpointError, UserError
from ..parallel.watch import Lost, Watch
from . import sharded
from .checkpoint import Checkpoints, Files, check_files

T = TypeVar("T")


class Stateful(Protocol):
    """Of an algorithm, what a checkpoint needs."""

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]: ...

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Make every tensor that `tensors` named when the state was this one."""

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None: ...


class LostRun(UserError, Lost):
    """`Lost`, for the command line."""


class Together:
    """All processes of a run; one process alone does the same without talking.

    Args:
        watch: of this process, where there are several.
    """

    def __init__(self, watch: Watch | None = None) -> None:
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.world = dist.get_world_size() if several else 1
        self.rank = dist.get_rank() if several else 0
        self.watch = watch

    @property
    def leader(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def agree(self, value: T) -> T:
        """The leader's value."""
        if self.world == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told, src=0)
        return told[0]

    def any(self, flag: bool) -> bool:
        """Whether it is true in one of them."""
        if self.world == 1:
            return flag
        flags: list[Any] = [None] * self.world
        dist.all_gather_object(flags, flag)
        return any(flags)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def lead(self, work: Callable[[], T]) -> T:
        """What the leader's work returns, or raises, in every process. It may ask the others for their share of `_check`."""
        if self.world == 1:
            return work()
        found: tuple[bool | None, Any] = (None, None)
        if self.leader:
            try:
                found = (True, work())
            except (UserError, ValueError, OSError) as error:
                found = (False, error)
        done, value = self.agree(found)
        while done is None:
            self._share(*value)
            done, value = self.agree(found)
        if not done:
            raise value
        return value

    def _check(self, path: Path, files: Files) -> str | None:
        """`check_files`, with each process reading its share. Within the leader's work."""
        if self.world == 1:
            return check_files(path, files)
        whole = {name: (int(size), int(crc)) for name, (size, crc) in files.items()}  # what is damaged fails here alone
        self.agree((None, (path, whole)))
        return self._share(path, whole)

    def _share(self, path: Path, files: Files) -> str | None:
        names = sorted(files, key=lambda name: (-files[name][0], name))[self.rank :: self.world]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, check_files(path, {name: files[name] for name in names}))
        return next((problem for problem in found if problem), None)

    def latest(self, checkpoints: Checkpoints) -> Path | None:
        """The checkpoint saved last of those that are undamaged; every process reads its share of the files."""
        return self.lead(lambda: checkpoints.latest(self._check))

    def save(
        self, checkpoints: Checkpoints, step: int, algorithm: Stateful, state: Mapping[str, Any], rng: Mapping[str, Tensor]
    ) -> None:
        """A checkpoint of the algorithm, each process writing what it holds.

        Raises:
            CheckpointError: in every process, where one could not be written.
        """
        if self.world == 1:
            checkpoints.save(step, {**algorithm.tensors(), "rng": rng}, state)
            return
        if not self.leader:
            self._join(algorithm)
            return
        joined = False

        def fill(directory: Path) -> Files:
            nonlocal joined
            joined = True
            self.agree(str(directory))
            return sharded.save(directory, algorithm.tensors())

        try:
            checkpoints.save(step, {"rng": rng}, state, files={sharded.SHARDS: fill})
        except (CheckpointError, OSError) as error:
            if not joined:
                self.agree(None)
            self.agree(str(error))
            raise
        self.agree("")

    def _join(self, algorithm: Stateful) -> None:
        directory = self.agree(None)
        if directory is not None:
            with suppress(CheckpointError):  # everyone's; the leader has it too and says what is left
                sharded.save(Path(directory), algorithm.tensors())
        problem = self.agree(None)
        if problem:
            raise CheckpointError(problem)

    def load(self, checkpoints: Checkpoints, path: Path, algorithm: Stateful) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Restore an algorithm from a checkpoint of any layout; its random states and its state.

        Raises:
            CheckpointError: it is damaged, or not one of this algorithm.
        """

        def check() -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
            tensors, state = checkpoints.load(path, self._check)
            if "rng" not in tensors or "algorithm" not in state:
                raise CheckpointError(f"{path}: this is no checkpoint of a run")
            spread = self.world > 1 or (path / sharded.SHARDS).is_dir()
            return ({"rng": tensors["rng"]} if spread else tensors), state

        tensors, state = self.lead(check)
        rng = tensors.pop("rng")
        if self.world > 1 or (path / sharded.SHARDS).is_dir():
            try:
                algorithm.prepare(state["algorithm"])
            except KeyError as error:
                raise CheckpointError(f"{path}: this is a checkpoint of another algorithm: its state has no {error}") from error
            tensors = {group: dict(named) for group, named in algorithm.tensors().items()}
            sharded.load(path, tensors)
        algorithm.restore(tensors, state["algorithm"])
        return rng, state

    def reason(self, error: BaseException) -> BaseException:
        """What to raise for an error: which process is gone, where that is why. The others are told of one's own. Asked again,
        of what it led to, nothing more happens."""
        if self.world == 1 or self.watch is None or self.watch.leaves:
            return error
        if isinstance(error, dist.DistBackendError | dist.DistNetworkError) or (
            isinstance(error, RuntimeError) and not isinstance(error, UserError) and _of_an_exchange(error)
        ):
            found = self.watch.explain(error)
            return LostRun(str(found)) if isinstance(found, Lost) else found
        self.watch.fail(error)
        return error


def _of_an_exchange(error: RuntimeError) -> bool:
    text = str(error).lower()
    return any(word in text for word in ("gloo", "nccl", "connection", "timed out", "timeout", "peer", "store", "socket"))
