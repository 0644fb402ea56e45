"""GRPO and RLOO against their formulas, on the rollouts they took."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastrlhf.algorithms.grpo import GroupRelative, GRPOConfig
from fastrlhf.algorithms.rloo import RLOO, RLOOConfig
from fastrlhf.config import ConfigError, load
from fastrlhf.training.progress import Silent


def run(algorithm: GroupRelative) -> tuple[Any, torch.Tensor, dict[str, Any]]:
    """The rollout, the advantages and the metrics of a step."""
    seen: list[Any] = []
    update = algorithm.policy.update

    def keep(rollout: Any, advantages: torch.Tensor, **options: Any) -> dict[str, float]:
        seen.append((rollout, advantages, options))
        return update(rollout, advantages, **options)

    algorithm.policy.update = keep  # type: ignore[method-assign]
    metrics = algorithm.step(1, Silent())
    rollout, advantages, options = seen[0]
    return rollout, advantages, metrics | {"options": options}


def test_grpo_normalises_within_a_prompt_and_puts_the_kl_in_the_loss(on_policy: Callable[..., list[str]]) -> None:
    algorithm = GroupRelative(load(GRPOConfig, None, on_policy("--completions_per_prompt", "4")))
    rollout, advantages, metrics = run(algorithm)
    groups = rollout.scores.view(6, 4)
    expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)
    torch.testing.assert_close(advantages, expected.reshape(-1), atol=1e-5, rtol=1e-5)
    assert metrics["options"]["kl_coef"] == 0.04 and rollout.logprobs is None  # one step: its own are the old ones
    assert float(metrics["policy/ratio_max"]) == 1
    assert not hasattr(algorithm, "critic")
    drift = metrics["drift"].to_dict()  # of the engine from the update's own log-probs, as there are no others
    assert drift["tokens"] == float(rollout.mask.sum()) and drift["max"] < 1e-4 and drift["outside_fraction"] == 0
    assert drift["not_finite_fraction"] == 0 and "position_3" in drift


def test_rloo_compares_with_the_others_after_the_kl(on_policy: Callable[..., list[str]]) -> None:
    algorithm = RLOO(load(RLOOConfig, None, on_policy("--completions_per_prompt", "3", "--kl.coef", "0.3")))
    with torch.no_grad():
        for p in algorithm.policy.model.parameters():
            p.add_(torch.randn_like(p) * 0.01)  # so that there is a KL
    rollout, advantages, metrics = run(algorithm)
    kl = (rollout.logprobs - rollout.ref_logprobs).split(rollout.sequences.completion_lengths)
    scores = (rollout.scores - 0.3 * torch.stack([k.sum() for k in kl])).view(6, 3)
    expected = scores - (scores.sum(1, keepdim=True) - scores) / 2
    torch.testing.assert_close(advantages, expected.reshape(-1), atol=1e-5, rtol=1e-5)
    assert metrics["options"]["kl_coef"] == 0 and abs(float(metrics["kl"])) > 1e-4


def test_a_group_needs_two(on_policy: Callable[..., list[str]]) -> None:
    with pytest.raises(ConfigError, match="completions_per_prompt: grpo compares completions, expected 2 or more, got 1"):
        GroupRelative(load(GRPOConfig, None, on_policy("--completions_per_prompt", "1")))


def test_minibatches_take_old_logprobs_from_before_the_first(on_policy: Callable[..., list[str]]) -> None:
    words = on_policy("--completions_per_prompt", "4", "--update.minibatch_size", "8", "--update.optimizer.lr", "1e-2")
    algorithm = GroupRelative(load(GRPOConfig, None, words))
    rollout, _, metrics = run(algorithm)
    assert rollout.logprobs is not None
    assert float(metrics["policy/ratio_max"]) > 1.001
