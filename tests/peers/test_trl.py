"""Our ops against TRL's own functions."""

from __future__ import annotations

import fastrlhf
import pytest
import torch

utils = pytest.importorskip("trl.trainer.utils")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_selective_log_softmax(temperature):
    logits, labels = torch.randn(3, 20, 4000) * 3, torch.randint(0, 4000, (3, 20))
    theirs = utils.selective_log_softmax(logits, labels, temperature=temperature)
    ours = fastrlhf.logprobs(logits, labels, temperature=temperature).logprobs
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    several = torch.randint(0, 4000, (3, 20, 4))
    theirs = utils.selective_log_softmax(logits, several, temperature=temperature)
    torch.testing.assert_close(
        fastrlhf.logprobs(logits, several, temperature=temperature).logprobs, theirs, rtol=1e-5, atol=1e-5
    )


def test_entropy():
    logits = torch.randn(4, 30, 3000) * 3
    labels = torch.zeros(4, 30, dtype=torch.long)
    ours = fastrlhf.logprobs(logits, labels, entropy=True).entropy
    torch.testing.assert_close(ours, utils.entropy_from_logits(logits), rtol=1e-5, atol=1e-5)


def test_bfloat16_is_where_we_differ():
    """TRL's fallback rounds in bfloat16; ours is exact for the same inputs."""
    logits, labels = (torch.randn(16, 8000) * 3).bfloat16(), torch.randint(0, 8000, (16,))
    exact = torch.log_softmax(logits.double(), -1).gather(-1, labels[:, None])[:, 0]
    assert float((fastrlhf.logprobs(logits, labels).logprobs - exact).abs().max()) < 2e-6
