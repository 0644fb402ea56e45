"""What SFT and reward training share: batches of examples, held-out evaluation, and the state of all that."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..data import Dataset, ExampleStream
from ..errors import ConfigError
from ..parallel import ParallelGroups
from .averages import Averages
from .metrics import Value
from .optim import Optimizer, OptimizerConfig, trainable
from .progress import Progress
from .shards import weights_of
from .state import load_into
from .timers import Timers

Example = TypeVar("Example")


class Supervised(ABC, Generic[Example]):
    """An `Algorithm` of the loop; a subclass says what an example's loss is.

    Args:
        held_out: to evaluate on; None evaluates nothing.
    """

    name = "supervised"

    def __init__(
        self, model: nn.Module, stream: ExampleStream[Example], held_out: Dataset[Example] | None,
        optimizer: OptimizerConfig, *, steps: int, batch_size: int, groups: ParallelGroups | None = None,
    ) -> None:  # fmt: skip
        self.groups = groups or ParallelGroups()
        self.model, self.stream, self.held_out = model, stream, held_out
        self.steps, self.batch_size = steps, batch_size
        self.optimizer = Optimizer(trainable(model), optimizer, steps, self.groups)
        self.timers = Timers(torch.cuda.synchronize if torch.cuda.is_available() else None)
        self.touched = False

    @abstractmethod
    def accumulate(self, examples: Sequence[Example]) -> dict[str, float]:
        """The gradient of the batch's loss, in as many micro-batches as it takes; without one where none is wanted.
        Metrics, "loss" among them."""

    @abstractmethod
    def length(self, example: Example) -> int:
        """Its tokens."""

    def weight(self, examples: Sequence[Example]) -> float:
        """What a batch's metrics count for in an evaluation."""
        return float(len(examples))

    @abstractmethod
    def export(self, directory: Path) -> None:
        """The trained model as a Hugging Face directory."""

    def step(self, step: int, progress: Progress) -> Mapping[str, Value]:
        self.touched = False
        examples = self.stream.next(self.batch_size)
        with self.timers("train", sum(map(self.length, examples))), progress.phase("train"):
            metrics = self.accumulate(examples)
            taken = self.optimizer.step(self.name, torch.tensor(metrics["loss"]))
            self.touched = True
        data = {"epoch": self.stream.epoch, "skipped": self.stream.skipped, "invalid": self.stream.invalid}
        return metrics | taken | {f"data/{name}": float(value) for name, value in data.items()}

    @torch.no_grad()
    def evaluate(self, progress: Progress) -> dict[str, Value]:
        """The metrics of the held-out examples.

        Raises:
            ConfigError: every one of them is too long or invalid.
        """
        if self.held_out is None:
            return {}
        found = [e for i in range(len(self.held_out)) if (e := self.held_out[i]) is not None]
        if not found:
            raise ConfigError(f"data.held_out: no example in it has at most {self.held_out.max_tokens} tokens")
        averages = Averages()
        for i in range(0, len(found), self.batch_size):
            part = found[i : i + self.batch_size]
            for name, value in self.accumulate(part).items():
                averages.value(name, value, self.weight(part))
        return {**averages.pop(), "examples": float(len(found))}

    def samples(self) -> list[dict[str, Any]]:
        return []

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {"model": weights_of(trainable(self.model), self.groups), "optimizer": self.optimizer.save()[0]}

    def state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.save()[1], "data": self.stream.state_dict()}

    def prepare(self, state: Mapping[str, Any]) -> None:
        self.optimizer.prepare(state["optimizer"])

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        load_into(trainable(self.model), tensors["model"], "model")
        self.optimizer.load(tensors["optimizer"], state["optimizer"])
        self.stream.load_state_dict(state["data"])
