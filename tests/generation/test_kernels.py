"""The engine draws the same tokens on the kernels as on the definitions: `--kernels triton` runs attention and sampling of a GPU."""

from __future__ import annotations

import pytest
from fastrlhf.generation import EmbeddedEngine, Sampling
from fastrlhf.ops import backend as backends

from .test_embedded import decoder, prompts, tokens


def test_completions_are_those_of_the_definitions(compiled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given, seeds = decoder("mistral", num_hidden_layers=1), prompts(3, 13), [7, 8, 9]  # a window, too

    def drawn(backend: str) -> list[list[list[int]]]:
        monkeypatch.setattr(backends, "_default", backend)
        engine = EmbeddedEngine(model, max_batch_tokens=8)  # prompts in chunks
        greedy = engine.generate(given, Sampling(max_tokens=2, temperature=0))
        return tokens(greedy) + tokens(engine.generate(given, Sampling(n=2, max_tokens=2, top_p=0.9), seeds=seeds))

    if compiled == "cuda":
        pytest.skip("attention over the cache has no CUDA kernel")
    assert drawn(compiled) == drawn("reference")
