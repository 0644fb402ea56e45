"""Our ops against verl's own functions, with the arguments that select its semantics."""

from __future__ import annotations

import fastrlhf
import pytest
import torch

core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
verl_F = pytest.importorskip("verl.utils.torch_functional")


def masks(B, T):
    mask = torch.rand(B, T) < 0.7
    mask[:, 0] = True
    return mask.float()


def test_gae():
    r, v, mask = torch.randn(6, 200), torch.randn(6, 200), masks(6, 200)
    theirs, their_returns = core_algos.compute_gae_advantage_return(r, v, mask, 0.99, 0.95)
    ours, returns = fastrlhf.gae(r, v, mask, gamma=0.99, lam=0.95, whiten=True)
    torch.testing.assert_close(returns, their_returns, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[mask != 0], theirs[mask != 0], rtol=1e-4, atol=1e-4)


def test_logprobs_and_entropy():
    logits, labels = torch.randn(30, 5000) * 3, torch.randint(0, 5000, (30,))
    ours = fastrlhf.logprobs(logits, labels, entropy=True)
    torch.testing.assert_close(ours.logprobs, verl_F.logprobs_from_logits_v2(logits, labels), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.entropy, verl_F.entropy_from_logits(logits), rtol=1e-5, atol=1e-5)


def test_masked_statistics():
    x, mask = torch.randn(5, 300), masks(5, 300)
    torch.testing.assert_close(fastrlhf.masked_mean(x, mask), verl_F.masked_mean(x, mask), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(fastrlhf.masked_var(x, mask), verl_F.masked_var(x, mask), rtol=1e-4, atol=1e-6)
    keep = mask != 0
    torch.testing.assert_close(fastrlhf.whiten(x, mask)[keep], verl_F.masked_whiten(x, mask)[keep], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("kl", {"kind": "k1"}),
        ("abs", {"kind": "abs"}),
        ("mse", {"kind": "k2"}),
        ("low_var_kl", {"kind": "k3", "clamp_input": 20.0, "clamp_output": 10.0}),
        ("k3+", {"kind": "k3", "clamp_input": 20.0, "clamp_output": 10.0, "straight_through": True}),
    ],
)
def test_kl_penalty(name, options):
    lp, ref = torch.randn(4, 50) * 4, torch.randn(4, 50) * 4
    a, b = lp.clone().requires_grad_(), lp.clone().requires_grad_()
    theirs, ours = core_algos.kl_penalty(a, ref, name), fastrlhf.kl(b, ref, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    theirs.sum().backward(), ours.sum().backward()
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "mode", ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]
)
def test_reductions_and_value_loss(mode):
    v, old, r, mask = torch.randn(5, 60), torch.randn(5, 60), torch.randn(5, 60), masks(5, 60)
    mask[2] = 0
    theirs, clipped = core_algos.compute_value_loss(v, r, old, mask, 0.2, loss_agg_mode=mode)
    ours = fastrlhf.value_loss(v, old, r, mask, reduction=mode)
    torch.testing.assert_close(ours.loss, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.stats.get("clip_fraction"), clipped, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "mode", "name"),
    [
        ("ppo", "token-mean", "vanilla"),
        ("cispo", "token-mean", "cispo"),
        ("sapo", "seq-mean-token-mean", "sapo"),
        ("gspo", "seq-mean-token-mean", "gspo"),
        ("gpg", "token-mean", "gpg"),
        ("gmpo", "seq-mean-token-mean", "geo_mean"),
    ],
)
def test_policy_losses(kind, mode, name):
    from verl.workers.config import FSDPActorConfig

    config = FSDPActorConfig(
        strategy="fsdp", rollout_n=1, clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=3.0,
        ppo_micro_batch_size_per_gpu=1, tau_pos=1.0, tau_neg=1.05,
    )  # fmt: skip
    old, mask = -torch.rand(6, 80), masks(6, 80)
    lp = old + torch.randn(6, 80) * 0.5
    A = torch.randn(6, 1).expand(6, 80).contiguous() if kind in ("gspo", "gmpo") else torch.randn(6, 80)
    a, b = lp.clone().requires_grad_(), lp.clone().requires_grad_()
    theirs, _ = core_algos.get_policy_loss_fn(name)(old, a, A, mask, mode, config)
    options = {"clip_low": 0.2, "clip_high": 0.28}
    if kind == "ppo":
        options |= {"dual_clip": 3.0, "ratio_clamp": 20.0}
    ours = fastrlhf.policy_loss(b, old, A, mask, kind=kind, reduction=mode, **options)
    torch.testing.assert_close(ours.loss, theirs, rtol=1e-5, atol=1e-6)
    theirs.backward(), ours.loss.backward()
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-7)


def test_group_advantages():
    import numpy as np

    scores, mask = torch.randn(12), torch.ones(12, 5)
    ids = np.array([0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 3, 3])
    rewards = torch.zeros(12, 5)
    rewards[:, -1] = scores
    for kind, function, options in (
        ("grpo", core_algos.compute_grpo_outcome_advantage, {}),
        ("rloo", core_algos.compute_rloo_outcome_advantage, {}),
    ):
        theirs, _ = function(rewards, mask, ids, **options)
        ours = fastrlhf.group_advantages(scores, torch.from_numpy(ids), kind=kind)
        torch.testing.assert_close(ours, theirs[:, 0], rtol=1e-4, atol=1e-5)
