"""Statistics that leave an op as one small device tensor, read once a step by whoever logs them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LossStats(NamedTuple):
    """`values` float32 (len(names),) on the device; reading one by name does not synchronise, `to_dict` does, once."""

    values: Tensor
    names: tuple[str, ...]

    def get(self, name: str) -> Tensor:
        """One statistic as a 0-dim tensor."""
        return self.values[self.names.index(name)]

    def to_dict(self) -> dict[str, float]:
        """All of them as Python floats; waits for the device."""
        return dict(zip(self.names, self.values.tolist(), strict=True))
