"""One process: the engine's parameters are the trainer's. Nothing is copied, and that it is so is asserted by address."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from ..session import Transfer
from ..states import RefitError, Weights


class Alias:
    """The `Target` of an engine that shares the trainer's memory.

    Args:
        weights: the engine's state.
        source, dest: give the parameters by name on both sides, as they are now.

    Raises:
        RefitError: at any refit: a parameter that is not the same memory, shape and dtype on both sides.
    """

    atomic = True  # nothing is written

    def __init__(
        self, weights: Weights, source: Callable[[], Mapping[str, Tensor]], dest: Callable[[], Mapping[str, Tensor]]
    ) -> None:
        self.weights, self.source, self.dest = weights, source, dest

    def begin(self, epoch: int, version: int, mode: str, timeout: float) -> None:
        # the trainer has changed what readers read: with drain there must be none, and waiting for them would be too late
        self.weights.begin(epoch, version, mode, 0.0 if mode == "drain" else timeout, shared=True)

    def transfer(self, epoch: int) -> Transfer:
        source, dest = self.source(), self.dest()
        if source.keys() != dest.keys():
            raise RefitError(f"{min(source.keys() ^ dest.keys())}: only one side has it")
        for name, tensor in source.items():
            other = dest[name]
            if (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) != (
                other.data_ptr(), other.shape, other.stride(), other.dtype,
            ):  # fmt: skip
                raise RefitError(
                    f"{name}: the engine's is not the trainer's memory: {other.data_ptr():#x}, {tensor.data_ptr():#x}"
                )
        return Transfer(sum(t.nbytes for t in source.values()), 0)

    def commit(self, epoch: int, version: int) -> None:
        self.weights.commit(epoch)

    def fail(self, epoch: int, reason: str) -> None:
        self.weights.fail(epoch, reason)

    def close(self) -> None:
        pass
