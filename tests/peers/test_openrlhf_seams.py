"""OpenRLHF's own modules with their functions replaced by ours."""

from __future__ import annotations

import importlib

import pytest
import torch
from fastrlhf import integrations
from fastrlhf.integrations.hosts.openrlhf import EXPERIENCE, HOST

from tests.integrations.test_patching import everything, same

from . import openrlhf_stubs, seams

openrlhf_stubs.load()
importlib.import_module("openrlhf.models")
importlib.import_module(EXPERIENCE)


@pytest.mark.parametrize("sizes", [s for s in seams.SIZES if s.dtype == torch.float32], ids=str)
@pytest.mark.parametrize("name", seams.names(HOST))
def test_equal(name, sizes):
    seams.check(HOST, name, sizes)


def test_live_and_left_as_it_was():
    actor = importlib.import_module("openrlhf.models.actor")
    before = everything("openrlhf")
    report = integrations.patch("openrlhf", quiet=True)
    try:
        assert len(report.live) == len(HOST.seams), str(report)
        assert actor.log_probs_from_logits.__fastrlhf__ and actor.compute_entropy.__fastrlhf__
        from openrlhf.models import PolicyLoss, ValueLoss

        old, mask = -torch.rand(3, 5), torch.ones(3, 5)
        new = (old + 0.3).requires_grad_()
        loss, clipped, kl, *_ = PolicyLoss()(new, old, torch.randn(3, 5), mask)
        loss.backward()
        torch.testing.assert_close(kl, torch.tensor(-0.3))
        assert 0 <= float(clipped) <= 1 and new.grad is not None
        ValueLoss(0.2)(new, old, old, mask).backward()
    finally:
        integrations.unpatch("openrlhf")
    assert same(before, everything("openrlhf"))


def test_a_rollout_correction_is_left_to_the_host():
    from openrlhf.models import PolicyLoss

    old, mask = -torch.rand(3, 5), torch.ones(3, 5)
    new, rollout, advantages = old + 0.1, old - 0.2, torch.randn(3, 5)
    loss = PolicyLoss(is_correction_level="token")
    expected = loss(new, old, advantages, mask, rollout_log_probs=rollout)
    integrations.patch("openrlhf", quiet=True)
    try:
        torch.testing.assert_close(loss(new, old, advantages, mask, rollout_log_probs=rollout), expected)
    finally:
        integrations.unpatch("openrlhf")
