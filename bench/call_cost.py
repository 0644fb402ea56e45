"""What one call costs when there is nothing to compute: 64 tokens, eager, no gradient."""

from __future__ import annotations

from collections.abc import Iterator

import fastrlhf as f
import torch

from .harness import OURS, Case, Variant


def cases(short: bool) -> Iterator[Case]:
    torch.manual_seed(0)
    x, y, z, mask, scores = torch.randn(4, 16), torch.randn(4, 16), torch.randn(4, 16), torch.rand(4, 16) < 0.7, torch.randn(4)
    logits, labels, ids, pairs = (
        torch.randn(64, 32),
        torch.randint(0, 32, (64,)),
        torch.zeros(4, dtype=torch.long),
        torch.randn(64),
    )
    calls = {
        "logprobs": lambda: f.logprobs(logits, labels),
        "logprobs + entropy": lambda: f.logprobs(logits, labels, entropy=True),
        "kl": lambda: f.kl(x, y),
        "kl_full": lambda: f.kl_full(logits, logits),
        "shape_rewards": lambda: f.shape_rewards(scores, x, y, mask, kl_coef=0.1),
        "gae": lambda: f.gae(x, y, mask),
        "gae, whitened": lambda: f.gae(x, y, mask, whiten=True),
        "discounted_returns": lambda: f.discounted_returns(x, mask),
        "experience": lambda: f.experience(scores, x, y, z, mask, kl_coef=0.1),
        "group_advantages": lambda: f.group_advantages(scores, ids),
        "masked_mean": lambda: f.masked_mean(x, mask),
        "masked_var": lambda: f.masked_var(x, mask),
        "whiten": lambda: f.whiten(x, mask),
        "policy_loss": lambda: f.policy_loss(x, y, z, mask),
        "value_loss": lambda: f.value_loss(x, y, z, mask),
        "sequence_logprobs": lambda: f.sequence_logprobs(x, mask),
        "preference_loss": lambda: f.preference_loss(pairs, pairs, pairs, pairs, kind="dpo"),
        "reward_loss": lambda: f.reward_loss(pairs, pairs),
        "regression_loss": lambda: f.regression_loss(x, y),
        "sample": lambda: f.sample(logits, seed=0),
    }
    for name, call in calls.items():
        yield Case("call", name, {OURS: Variant(call)})  # no input wants a gradient; no_grad() itself would cost 2 us
