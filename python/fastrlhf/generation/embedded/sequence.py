"""A prompt and the tokens drawn for it so far."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from ..engine import Completion, Sampling


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
        self.weight_spans: list[tuple[int, int]] = []  # (version, tokens drawn with it)

    @property
    def drawn(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def completion(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    def draw(self, token: int, logprob: float, version: int) -> None:
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self.weight_spans and self.weight_spans[-1][0] == version:
            self.weight_spans[-1] = (version, self.weight_spans[-1][1] + 1)
        else:
            self.weight_spans.append((version, 1))

    def completed(self, reason: str) -> Completion:
        version = self.weight_spans[0][0] if self.weight_spans else 0
        return Completion(self.completion, self.logprobs, reason, version, tuple(self.weight_spans))
