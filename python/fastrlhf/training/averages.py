"""Statistics of micro-batches brought together, as if they had been taken over the whole batch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import LossStats


class Averages:
    """Weighted means; names ending in _min and _max keep the extreme, "tokens" adds up. Stays on the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor | float] = {}

    def add(self, stats: LossStats) -> None:
        """The statistics of a loss, weighted by its tokens."""
        weight = stats.get("tokens")
        for name, value in zip(stats.names, stats.values, strict=True):
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

    def pop(self) -> dict[str, float]:
        """The statistics so far; starts again from nothing. Where nothing was counted, 0."""
        out = {name: float(total) for name, total in self._sums.items()}
        for name, weight in self._weights.items():
            out[name] = out[name] / float(weight) if float(weight) else 0.0
        self._sums, self._weights = {}, {}
        return out
