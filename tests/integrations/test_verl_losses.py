"""Our losses and estimators under verl's signature, without verl."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from fastrlhf.integrations.hosts import verl_losses


class Config(dict):
    clip_ratio, clip_ratio_low, clip_ratio_high, global_batch_info = 0.2, None, None, {}


@pytest.mark.parametrize("kind", ["ppo", "cispo"])
def test_rollout_weights_multiply_the_loss_and_leave_the_statistics(kind):
    draw = torch.Generator().manual_seed(0)
    old = -torch.rand(2, 6, generator=draw)
    new, A = old + torch.randn(2, 6, generator=draw), torch.randn(2, 6, generator=draw)
    loss, mask, weights = verl_losses.policy_loss(kind)(None), torch.ones(2, 6), torch.ones(2, 6)
    _, metrics = loss(old, new, A, mask, config=Config())
    weights[0] = 0
    half, same = loss(old, new, A, mask, config=Config(), rollout_is_weights=weights)
    alone, _ = loss(old[1:], new[1:], A[1:], mask[1:], config=Config())
    assert same == metrics and metrics["actor/pg_clipfrac"] > 0
    torch.testing.assert_close(half, alone / 2)


def test_grpo_reads_whether_to_divide_by_the_deviation():
    estimate = verl_losses.estimator("grpo")(None)
    rewards, mask, index = torch.tensor([[1.0], [0.0], [4.0]]), torch.ones(3, 1), ["a", "a", "b"]
    plain = SimpleNamespace(norm_adv_by_std_in_grpo=False)
    assert estimate(rewards, mask, index=index, config=plain)[0].flatten().tolist() == [0.5, -0.5, 4.0]
    assert float(estimate(rewards, mask, index=index)[0][0]) == pytest.approx(0.5**0.5, rel=1e-4)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo", "opo"])
def test_a_group_of_one_keeps_its_score(kind):
    found, _ = verl_losses.estimator(kind)(None)(torch.tensor([[4.0]]), torch.ones(1, 1), index=["a"])
    assert float(found) == pytest.approx(4.0, rel=1e-5)


def test_the_prompt_of_each_answer_is_needed():
    with pytest.raises(ValueError, match="index: the prompt of each answer is needed, got None"):
        verl_losses.estimator("rloo")(None)(torch.ones(2, 3), torch.ones(2, 3))
