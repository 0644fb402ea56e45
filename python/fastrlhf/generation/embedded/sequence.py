"""A prompt and the tokens drawn for it so far."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from ..engine import Sampling


class Share(NamedTuple):
    """Samples [first, first + samples) of a prompt, which are drawn together."""

    prompt: int
    first: int
    samples: int


Work = Callable[[int], Iterable[Share]]
"""Sequences under way -> what to begin now."""


def given(shares: Iterable[Share]) -> Work:
    """All at once."""
    left = list(shares)

    def work(running: int) -> list[Share]:
        taken, left[:] = list(left), []
        return taken

    return work


class Sequence:
    """One sample of a prompt. Until the prompt is in the cache it stands for its `siblings` too."""

    def __init__(self, prompt: int, sample: int, tokens: list[int], seed: int, sampling: Sampling, siblings: int = 0) -> None:
        self.prompt, self.sample = prompt, sample
        self.tokens, self.prompt_length = tokens, len(tokens)
        self.logprobs: list[float] = []
        self.seed, self.sampling, self.siblings = seed, sampling, siblings
        self.cached = 0  # tokens whose keys and values are in the cache
        self.blocks: list[int] = []
        self.weight_version = 0

    @property
    def drawn(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def completion(self) -> list[int]:
        return self.tokens[self.prompt_length :]
