"""What a generation engine is: prompts in, completions out, weights replaced in between.

The embedded engine, TensorRT-LLM, vLLM and SGLang stand behind this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from ..refit.session import Refit


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Args:
        n: completions of each prompt.
        max_tokens: the most tokens a completion has, its end token among them.
        temperature: >= 0; 0 takes the most likely token.
        top_k: 0 for no cut.  top_p: in (0, 1].  min_p: in [0, 1].
        stop_tokens: token ids that end a completion and belong to it.
        stop: strings that end a completion when its text holds them; their tokens belong to it.
    """

    n: int = 1
    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_tokens: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n: expected >= 1, got {self.n}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens: expected >= 1, got {self.max_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: expected >= 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected >= 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p: expected in [0, 1], got {self.min_p}")
        if any(not s for s in self.stop):
            raise ValueError("stop: expected strings that are not empty")


@dataclass(frozen=True)
class Completion:
    """`logprobs` are of the tokens under what they were drawn from, in nats. `finish_reason` is "stop" (an end token or
    string), "length", or "abort" where new weights cut it off. `weight_version` is that of the weights which drew its first
    token; `weight_spans` has (version, tokens) for each stretch of tokens, one unless weights changed under way."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    weight_version: int = 0
    weight_spans: tuple[tuple[int, int], ...] = ()

    @property
    def ended(self) -> bool:
        return self.finish_reason == "stop"


class Finished(NamedTuple):
    """A completion as soon as it is done: the `sample`-th of the `prompt`-th prompt of the call."""

    prompt: int
    sample: int
    completion: Completion


@dataclass
class GenerationStats:
    """Of the last call. Counts are of tokens; `forward_tokens` is what went through the model."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    forward_tokens: int = 0
    steps: int = 0
    preemptions: int = 0


class Engine(Protocol):
    """Draws completions with the weights it was given last."""

    stats: GenerationStats

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seeds: Sequence[int] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:  # fmt: skip
        """n completions of each prompt. `seeds`: one for each prompt; the same seed draws the same completions whatever
        else is in the batch. `progress` is told of each that ends."""
        ...

    def stream(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seeds: Sequence[int] | None = None
    ) -> Iterator[Finished]:
        """The same, each as it ends."""
        ...

    def update_weights(self, weights: Iterable[tuple[str, Tensor]] | None, version: int) -> Refit:
        """Take new weights before the next call: those given, by Hugging Face names, or None for those of the model that the
        engine was made for, as they are now."""
        ...

    def close(self) -> None:
        """Ends what the engine started."""
        ...
