from __future__ import annotations

import fastrlhf
import pytest
import torch
from fastrlhf.kernels.sampling.reference import philox_uniform

from tests.oracle import INTERPRETED

TEMPERATURES = [(1.0,), (0.6,), (2.0,), (0.6,)] if INTERPRETED else [(1.0, 0.6, 2.0)] * 4  # of each vocabulary
CUTS = [{}, {"top_k": 1}, {"top_k": 17}, {"top_p": 0.7}, {"min_p": 0.05}, {"top_k": 50, "top_p": 0.9, "min_p": 0.01}]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tokens_logprobs_and_kept_sets_are_the_definition(compiled, cut, dtype):
    for vocab, temperatures in zip((1, 2, 129, 5000), TEMPERATURES, strict=True):
        logits = (torch.randn(2 if INTERPRETED else 20, vocab) * 3).to(dtype)
        for temperature in temperatures:
            ours = fastrlhf.sample(logits, temperature=temperature, seed=5, kept=True, backend=compiled, **cut)
            exact = fastrlhf.sample(logits, temperature=temperature, seed=5, kept=True, backend="reference", **cut)
            assert torch.equal(ours.kept[0], exact.kept[0]) and torch.equal(ours.kept[1], exact.kept[1])
            assert torch.equal(ours.tokens, exact.tokens)
            torch.testing.assert_close(ours.logprobs, exact.logprobs, rtol=1e-5, atol=2e-6)


def test_logprobs_are_what_training_recomputes(backend):
    """`logprobs` over the kept set gives the sampler's numbers back."""
    logits = torch.randn(5 if INTERPRETED else 30, 3000) * 2
    s = fastrlhf.sample(logits, temperature=0.8, top_p=0.8, top_k=100, seed=1, kept=True, backend=backend)
    again = fastrlhf.logprobs(logits, s.tokens, temperature=0.8, kept=s.kept, backend=backend).logprobs
    torch.testing.assert_close(again, s.logprobs, rtol=1e-5, atol=2e-6)
    plain = fastrlhf.sample(logits, seed=1, backend=backend)
    torch.testing.assert_close(
        fastrlhf.logprobs(logits, plain.tokens, backend=backend).logprobs, plain.logprobs, rtol=1e-5, atol=2e-6
    )


def test_distribution(compiled):
    """Chi-square of 40,000 draws (interpreted 300) over 12 tokens; 11 degrees of freedom, 31.3 is one in a thousand."""
    logits = torch.randn(12) * 1.5
    n = 300 if INTERPRETED else 40000
    tokens = fastrlhf.sample(logits.expand(n, 12), seed=3).tokens
    expected = torch.softmax(logits.double(), -1) * n
    chi = ((torch.bincount(tokens, minlength=12) - expected) ** 2 / expected).sum()
    assert float(chi) < 31.3
    uniforms = torch.tensor([philox_uniform(3, i) for i in range(20000)], dtype=torch.float64)
    assert abs(float(uniforms.mean()) - 0.5) < 0.01 and abs(float(uniforms.var()) - 1 / 12) < 0.003


def test_philox_is_philox():
    """The published test vector of Philox 4x32-10 with zero key and counter: 6627e8d5 e169c58d ..."""
    assert philox_uniform(0, 0) == ((0x6627E8D5E169C58D) >> 11) * 2.0**-53


def test_a_sequence_draws_the_same_whatever_the_batch(compiled):
    rows = 5 if INTERPRETED else 17
    logits, seeds = torch.randn(rows, 999), torch.randint(0, 2**62, (rows,))
    whole = fastrlhf.sample(logits, seed=seeds, top_p=0.9)
    order = torch.randperm(rows)
    moved = fastrlhf.sample(logits[order], seed=seeds[order], top_p=0.9)
    assert torch.equal(whole.tokens[order], moved.tokens) and torch.equal(whole.logprobs[order], moved.logprobs)
    for i in range(rows):
        one = fastrlhf.sample(logits[i], seed=seeds[i], top_p=0.9)
        assert one.tokens == whole.tokens[i] and one.logprobs == whole.logprobs[i]


def test_settings_of_rows(backend):
    logits = torch.randn(4, 500)
    temperature, top_k = torch.tensor([0.0, 0.5, 1.0, 2.0]), torch.tensor([0, 5, 1, 0])
    top_p, min_p = torch.tensor([1.0, 0.5, 1.0, 0.9]), torch.tensor([0.0, 0.0, 0.1, 0.2])
    seeds = torch.arange(4)
    both = fastrlhf.sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seeds, backend=backend)
    for i in range(4):
        one = fastrlhf.sample(
            logits[i], temperature=float(temperature[i]), top_k=int(top_k[i]), top_p=float(top_p[i]), min_p=float(min_p[i]),
            seed=seeds[i], backend=backend,
        )  # fmt: skip
        assert one.tokens == both.tokens[i]
    assert both.tokens[0] == logits[0].argmax() and both.logprobs[0] == 0 and both.tokens[2] == logits[2].argmax()


def test_ties_are_kept_together(backend):
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]])
    for cut in ({"top_k": 2}, {"top_p": 0.3}):
        kept = fastrlhf.sample(logits, seed=0, kept=True, backend=backend, **cut).kept
        assert kept[1].tolist() == [1, 2, 3]
    assert fastrlhf.sample(logits, temperature=0, backend=backend).tokens.item() == 1


def test_excluded_tokens_are_never_drawn(compiled):
    logits = torch.full((16 if INTERPRETED else 2000, 40), -torch.inf)
    logits[:, 7], logits[:, 31] = 0.0, 0.5
    assert set(fastrlhf.sample(logits, seed=0).tokens.tolist()) == {7, 31}
    assert fastrlhf.sample(logits, seed=0, kept=True, top_k=30).kept[1].unique().tolist() == [7, 31]


def test_generator(backend):
    logits = torch.randn(5, 50)
    a = fastrlhf.sample(logits, generator=torch.Generator().manual_seed(1), backend=backend)
    b = fastrlhf.sample(logits, generator=torch.Generator().manual_seed(1), backend=backend)
    assert torch.equal(a.tokens, b.tokens)
    torch.manual_seed(4)
    c = fastrlhf.sample(torch.zeros(8 if INTERPRETED else 64, 1000), backend=backend).tokens
    d = fastrlhf.sample(torch.zeros(8 if INTERPRETED else 64, 1000), backend=backend).tokens
    assert not torch.equal(c, d)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, None])
def test_rows_that_cannot_be_sampled(backend, bad):
    logits = torch.randn(3, 10)
    logits[1] = -torch.inf if bad is None else logits[1]
    if bad is not None:
        logits[1, 4] = bad
    if backend == "triton":  # says so without a wait for the device
        out = fastrlhf.sample(logits, top_k=3, backend=backend)
        assert (out.tokens < 0).tolist() == [False, True, False] and out.logprobs.isnan().tolist() == [False, True, False]
        return
    if backend == "cuda":
        pytest.skip("an op here has no CUDA kernel")
    with pytest.raises(ValueError, match="logits: row 1"):
        fastrlhf.sample(logits, top_k=3, backend=backend)
