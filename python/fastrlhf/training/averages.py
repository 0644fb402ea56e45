"""Statistics of micro-batches brought together, as if they had been taken over the whole batch."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops import LossStats
from ..parallel import ParallelGroups


class Averages:
    """Weighted means; names ending in _min and _max keep the extreme, "tokens" adds up. Stays on the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor | float] = {}

    def add(self, stats: LossStats, leave_out: Collection[str] = ()) -> None:
        """The statistics of a loss, weighted by its tokens; without those that parts do not add up to."""
        weight = stats.get("tokens")
        for name, value in zip(stats.names, stats.values, strict=True):
            if name not in leave_out:
                self.value(name, value, weight)

    def value(self, name: str, value: Tensor | float, weight: Tensor | float = 1.0) -> None:
        value = torch.as_tensor(value, dtype=torch.float32)
        if name.endswith(("_min", "_max")):
            held = self._sums.get(name)
            better = torch.minimum if name.endswith("_min") else torch.maximum
            self._sums[name] = value if held is None else better(held, value)
        elif name.rpartition("/")[2] == "tokens":
            self._sums[name] = self._sums.get(name, torch.zeros(())) + value
        else:
            self._sums[name] = self._sums.get(name, torch.zeros(())) + value * weight
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def pop(self, groups: ParallelGroups | None = None) -> dict[str, float]:
        """The statistics so far; starts again from nothing. Where nothing was counted, 0.

        Args:
            groups: the statistics of all their replicas together, the same in each; one exchange. Collective over them.
        """
        sums = {name: float(total) for name, total in self._sums.items()}
        weights = {name: float(weight) for name, weight in self._weights.items()}
        self._sums, self._weights = {}, {}
        if groups is not None and groups.replicas.size > 1:
            sums, weights = _merged(sums, weights, groups)
        for name, weight in weights.items():
            sums[name] = sums[name] / weight if weight else 0.0
        return sums


def _merged(
    sums: dict[str, float], weights: dict[str, float], groups: ParallelGroups
) -> tuple[dict[str, float], dict[str, float]]:
    found: list[Any] = [None] * groups.replicas.size
    dist.all_gather_object(found, (sums, weights), group=groups.replicas.group)
    every, over = dict[str, float](), dict[str, float]()
    for part, weight in found:
        for name, value in part.items():
            if name.endswith(("_min", "_max")) and name in every:
                every[name] = (min if name.endswith("_min") else max)(every[name], value)
            else:
                every[name] = every.get(name, 0.0) + value
        for name, value in weight.items():
            over[name] = over.get(name, 0.0) + value
    return every, over
