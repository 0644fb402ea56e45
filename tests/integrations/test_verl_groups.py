"""verl's group advantages: what a group is, and what is left of a group of one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fastrlhf.integrations.hosts import verl_groups


def host(token_level_rewards, response_mask, index, epsilon=1e-6, norm_adv_by_std_in_grpo=True, config=None):
    raise AssertionError("ours serves this")


REWARDS, MASK = torch.tensor([[1.0, 0], [0, 0], [3, 0], [5, 0]]), torch.ones(4, 2)


@pytest.mark.parametrize("build", [verl_groups.grpo, verl_groups.advantages("rloo", alone="zero")])
def test_group_ids_in_a_tensor(build):
    """A tensor's elements are equal by value, not by being the same object."""
    ids = np.array([7, 7, 2, 2])
    expected = build(host)(REWARDS, MASK, ids)[0]
    assert torch.equal(build(host)(REWARDS, MASK, torch.from_numpy(ids))[0], expected)
    assert torch.equal(build(host)(REWARDS, MASK, torch.from_numpy(ids).view(4, 1))[0], expected)


def test_a_group_of_one_is_divided_by_its_deviation_of_one_and_epsilon():
    found, _ = verl_groups.grpo(host)(torch.tensor([[1.0], [2.0], [4.0]]), torch.ones(3, 1), ["a", "a", "b"], 0.5)
    assert float(found[2]) == pytest.approx(4 / 1.5)
