"""Statistics of parts are those of the whole."""

from __future__ import annotations

import pytest
import torch
from fastrlhf import policy_loss
from fastrlhf.training.averages import Averages


def test_parts_make_the_whole() -> None:
    new, old, advantages = torch.randn(3, 40) * 0.3, torch.randn(3, 40) * 0.3, torch.randn(3, 40)
    mask = torch.rand(3, 40) < 0.7
    whole = policy_loss(new, old, advantages, mask).stats.to_dict()
    averages = Averages()
    for a, b in ((0, 1), (1, 3)):
        averages.add(policy_loss(new[a:b], old[a:b], advantages[a:b], mask[a:b]).stats)
    assert averages.pop() == pytest.approx(whole, abs=1e-5)
    assert averages.pop() == {}


def test_weights_extremes_and_counts() -> None:
    averages = Averages()
    averages.value("loss", 1.0, 1.0)
    averages.value("loss", torch.tensor(4.0), torch.tensor(3.0))
    averages.value("ratio_max", 2.0)
    averages.value("ratio_max", 1.0)
    averages.value("ratio_min", 2.0)
    averages.value("ratio_min", 1.0)
    averages.value("policy/tokens", 5.0)
    averages.value("policy/tokens", 6.0)
    averages.value("nothing", 7.0, 0.0)
    assert averages.pop() == {"loss": 3.25, "ratio_max": 2.0, "ratio_min": 1.0, "policy/tokens": 11.0, "nothing": 0.0}
