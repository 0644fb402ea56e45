"""A prompt and the tokens drawn for it so far."""

from __future__ import annotations

from ..engine import Sampling

_GOLDEN, _MASK = 0x9E3779B97F4A7C15, 2**64 - 1


def mix(seed: int, stream: int) -> int:
    """A seed for the stream-th sequence of a seed: splitmix64's finalizer. In [-2^63, 2^63)."""
    z = (seed + (stream + 1) * _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    z ^= z >> 31
    return z - 2**64 if z >= 2**63 else z


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
