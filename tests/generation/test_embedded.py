"""Greedy is transformers' token by token; a sampled sequence is its own whatever runs beside it; logprobs are the trainer's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fastrlhf.generation import Completion, EmbeddedEngine, Sampling
from fastrlhf.models import Decoder, DecoderConfig, Packed, save_decoder, token_logprobs
from fastrlhf.models.checkpoint import named_weights
from fastrlhf.refit import Poisoned

SMALL = {
    "vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3, "head_dim": 16,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {"sliding_window": 9}, "qwen2": {"tie_word_embeddings": True}, "qwen3": {},
}  # fmt: skip


def decoder(kind: str = "llama", **more: Any) -> Decoder:
    return Decoder(DecoderConfig.from_hf({"model_type": kind, **SMALL, **FAMILIES[kind], **more})).initialize(3)


@pytest.fixture
def model() -> Decoder:
    return decoder()


def prompts(count: int = 12, longest: int = 40) -> list[list[int]]:
    g = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, longest + 1, (count,), generator=g).tolist()
    return [torch.randint(0, 101, (n,), generator=g).tolist() for n in lengths]


def tokens(out: list[list[Completion]]) -> list[list[list[int]]]:
    return [[c.tokens for c in group] for group in out]


@pytest.mark.parametrize("kind", FAMILIES)
def test_greedy_is_transformers_token_by_token(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = decoder(kind)
    save_decoder(ours, tmp_path)
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    given = prompts(6)
    got = EmbeddedEngine(ours).generate(given, Sampling(max_tokens=24, temperature=0))
    for prompt, (completion,) in zip(given, got, strict=True):
        ids = torch.tensor([prompt])
        expected = hf.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert completion.tokens == expected[0, len(prompt) :].tolist()
        assert completion.finish_reason == "length"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_trainers(temperature: float) -> None:
    model, given = decoder(initializer_range=0.1), prompts()
    out = EmbeddedEngine(model).generate(given, Sampling(n=2, max_tokens=20, temperature=temperature))
    for prompt, group in zip(given, out, strict=True):
        for c in group:
            ids, pack = Packed.of([prompt + c.tokens])
            at = torch.arange(len(prompt) - 1, len(prompt) + len(c.tokens) - 1)
            with torch.no_grad():
                again = token_logprobs(model, model(ids, pack)[at], ids[at + 1], temperature=temperature)
            assert (again.logprobs - torch.tensor(c.logprobs)).abs().max() < 1e-5


def test_a_completion_is_its_own_whatever_runs_beside_it(model: Decoder) -> None:
    given, seeds = prompts(), list(range(100, 112))
    drawn = Sampling(n=3, max_tokens=30, top_p=0.95)
    whole = EmbeddedEngine(model).generate(given, drawn, seeds=seeds)
    assert len({tuple(c.tokens) for group in whole for c in group}) == 36
    for small in (
        EmbeddedEngine(model, max_sequences=5),
        EmbeddedEngine(model, max_batch_tokens=7),  # prompts in chunks
        EmbeddedEngine(model, cache_tokens=16 * 12),  # sequences thrown out and computed again
    ):
        assert small.generate(given, drawn, seeds=seeds) == whole
    assert small.stats.preemptions > 0
    for i in (0, 5):
        assert EmbeddedEngine(model).generate([given[i]], drawn, seeds=[seeds[i]])[0] == whole[i]
    one = EmbeddedEngine(model).generate(given, Sampling(max_tokens=30, top_p=0.95), seeds=seeds)
    assert [g[0] for g in one] == [g[0] for g in whole]
    assert tokens(EmbeddedEngine(model).generate(given, drawn, seeds=[s + 1 for s in seeds])) != tokens(whole)


def test_samples_of_a_prompt_share_its_computation(model: Decoder) -> None:
    engine = EmbeddedEngine(model)
    prompt = prompts(1, 1)[0] * 50
    engine.generate([prompt], Sampling(n=8, max_tokens=4))
    assert engine.stats.forward_tokens == 50 + 8 * 3
    assert (engine.stats.prompt_tokens, engine.stats.completion_tokens) == (50, 32)


def test_end_tokens_and_strings(model: Decoder) -> None:
    class Letters:
        def decode(self, ids: list[int]) -> str:
            return "".join(chr(40 + i) for i in ids)

    given = prompts()
    free = EmbeddedEngine(model).generate(given, Sampling(max_tokens=40), seeds=range(12))
    third = free[0][0].tokens[2]
    stopped = EmbeddedEngine(model).generate(given, Sampling(max_tokens=40, stop_tokens=(third,)), seeds=range(12))
    for (a,), (b,) in zip(free, stopped, strict=True):
        end = a.tokens.index(third) + 1 if third in a.tokens else 40
        assert b.tokens == a.tokens[:end] and b.logprobs == a.logprobs[:end]
        assert b.ended == (third in a.tokens)
    word = Letters().decode(free[1][0].tokens[3:6])
    by_text = EmbeddedEngine(model, Letters()).generate(
        given, Sampling(max_tokens=40, stop=(word, "no such text")), seeds=range(12)
    )
    assert by_text[1][0].tokens == free[1][0].tokens[:6] and by_text[1][0].finish_reason == "stop"
    with pytest.raises(ValueError, match="stop: strings need an engine with a tokenizer"):
        EmbeddedEngine(model).generate(given, Sampling(stop=("a",)))


def test_completions_stream_as_they_end(model: Decoder) -> None:
    engine = EmbeddedEngine(model)
    options = Sampling(max_tokens=20, stop_tokens=tuple(range(0, 101, 10)))
    seen = list(engine.stream(prompts(), options, seeds=range(12)))
    lengths = [len(f.completion.tokens) for f in seen]
    assert sorted(f.prompt for f in seen) == list(range(12))
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]  # the shortest first: none waits for another
    engine = EmbeddedEngine(model, max_sequences=4)
    first = next(iter(engine.stream(prompts(), Sampling(max_tokens=5))))
    assert len(first.completion.tokens) == 5
    assert engine.stats.completion_tokens < 12 * 5  # the rest was not yet drawn


def test_the_cache_is_made_for_what_is_under_way_at_once(model: Decoder) -> None:
    def blocks(at_once: int | None) -> int:
        engine = EmbeddedEngine(model)
        assert len(list(engine.stream(prompts(), Sampling(max_tokens=20), at_once=at_once))) == 12
        return engine._blocks

    assert blocks(None) > 3 * blocks(3)


def test_the_engine_draws_from_the_trainers_weights_as_they_are_now(model: Decoder) -> None:
    engine = EmbeddedEngine(model)
    given = prompts()
    before = engine.generate(given, Sampling(max_tokens=8, temperature=0))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    engine.update_weights(None, 7)
    after = engine.generate(given, Sampling(max_tokens=8, temperature=0))
    assert tokens(after) != tokens(before) and after[0][0].weight_version == 7
    other = decoder()
    apart = EmbeddedEngine(other)
    from fastrlhf.models.checkpoint import named_weights

    apart.update_weights(named_weights(model), 7)
    assert apart.generate(given, Sampling(max_tokens=8, temperature=0)) == after


def test_weights_of_which_some_are_missing_are_never_served() -> None:
    """They are written one after the other; what was there is a mixture by then."""
    engine, other = EmbeddedEngine(decoder()), decoder()
    given = list(named_weights(other))
    with pytest.raises(Exception, match=r"."):
        engine.update_weights(given[: len(given) // 2], 1)
    with pytest.raises(Poisoned, match="loading version 1 failed half way"):
        engine.generate([[1, 2]], Sampling(max_tokens=2))
    engine.update_weights(given, 2)
    assert engine.version == 2 and len(engine.generate([[1, 2]], Sampling(max_tokens=2))) == 1


def test_bad_input_is_named(model: Decoder) -> None:
    engine = EmbeddedEngine(model)
    for given, options, message in (
        ([[1], []], {}, "prompts: prompt 1 is empty"),
        ([[1], [2, 101]], {}, "prompts: prompt 1 holds a token outside the vocabulary of 101"),
        ([[1] * 250], {"max_tokens": 8}, "prompts: prompt 0 has 250 tokens, which with max_tokens 8 exceed the context of 256"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.generate(given, Sampling(**options))
    with pytest.raises(ValueError, match="seeds: expected 1, one for each prompt, got 2"):
        engine.generate([[1]], Sampling(), seeds=[1, 2])
    with pytest.raises(ValueError, match="cache_tokens: a sequence of 129 does not fit in 64"):
        EmbeddedEngine(model, cache_tokens=64).generate([[1]], Sampling())
    for options, message in (
        ({"n": 0}, "n: expected >= 1"), ({"temperature": -1.0}, "temperature: expected >= 0"), ({"top_p": 0.0}, "top_p: "),
        ({"min_p": 2.0}, "min_p: "), ({"top_k": -1}, "top_k: "), ({"max_tokens": 0}, "max_tokens: "), ({"stop": ("",)}, "stop: "),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Sampling(**options)  # type: ignore[arg-type]
    assert engine.generate([], Sampling()) == []
