"""Inputs on which hosts' functions and ours are compared: masks with interior gaps, clamps that bite, rows of one token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..seam import Sizes


class Inputs(NamedTuple):
    """Of a batch (rows, length); made from a seed of their own, so that nothing of the caller's random state is used."""

    sizes: Sizes
    generator: torch.Generator

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return self._placed(torch.randn(shape, generator=self.generator) * scale)

    def logits(self, *lead: int) -> Tensor:
        return self.normal(*lead, self.sizes.vocab, scale=3.0)

    def head(self) -> Tensor:
        """Weights (vocab, hidden) that make logits as wide as those above of hidden states from a normal distribution.

        Wider ones compare little but float32: at |logit| 80 host and ours both differ by 4e-5 from the float64 value.
        """
        return self.normal(self.sizes.vocab, self.sizes.hidden, scale=3.0 / self.sizes.hidden**0.5)

    def labels(self, *lead: int) -> Tensor:
        return torch.randint(0, self.sizes.vocab, lead, generator=self.generator).to(self.sizes.device)

    def batch(self, scale: float = 1.0) -> Tensor:
        return self.normal(self.sizes.rows, self.sizes.length, scale=scale)

    def mask(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """With gaps inside; its last row ends early, and its first token counts."""
        m = torch.rand(self.sizes.rows, self.sizes.length, generator=self.generator) < 0.7
        m[:, 0] = True
        m[-1, self.sizes.length // 2 :] = False
        return m.to(dtype).to(self.sizes.device)

    def logprobs(self) -> Tensor:
        return -self.batch().abs()

    def _placed(self, t: Tensor) -> Tensor:
        return t.to(self.sizes.dtype).to(self.sizes.device)


def inputs(sizes: Sizes, seed: int = 0) -> Inputs:
    return Inputs(sizes, torch.Generator().manual_seed(seed))
