"""The fused loss against the two ops' definitions in float64, and that it is one read where it can be."""

from __future__ import annotations

import fastrlhf
import pytest
import torch
from fastrlhf.kernels.logprobs import reference as logprobs_reference
from fastrlhf.kernels.policy_loss import reference
from fastrlhf.ops import backend as backends

from tests.oracle import assert_accurate, assert_gradient_accurate

KINDS = ("ppo", "reinforce", "cispo", "sapo", "gspo")


def inputs(B, T, V, dtype):
    logits = (torch.randn(B, T, V) * 3).to(dtype)
    labels = torch.randint(0, V, (B, T))
    lp = torch.log_softmax(logits.float(), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    old = lp + torch.randn(B, T) * 0.4
    return logits, labels, old, torch.randn(B, T), torch.rand(B, T) < 0.7


def definition(logits, labels, old, advantages, mask, temperature=1.0, ignore_index=-100, **options):
    lp, H, _ = logprobs_reference.logprobs(logits, labels, temperature=temperature, ignore_index=ignore_index)
    if mask is None:
        mask = labels != ignore_index
    wide = {k: v.to(logits.dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()}
    return reference.policy_loss(lp, old.to(lp.dtype), advantages.to(lp.dtype), mask, entropy=H, **wide)


def check(arguments, backend, **options):
    logits, *rest = arguments
    x, y, z = (logits.detach().to(d, copy=True).requires_grad_() for d in (logits.dtype, torch.float64, torch.float32))
    ours = fastrlhf.logits_policy_loss(x, *rest, backend=backend, **options)
    oracle, stats = definition(y, *rest, **options)
    plain, plain_stats = definition(z, *rest, **options)
    for loss in (ours.loss, oracle, plain):
        (loss * 2).backward()
    assert_accurate(ours.loss, oracle, plain, "loss")
    assert_accurate(ours.stats.values, stats, plain_stats, "stats")
    assert_gradient_accurate(x.grad, y.grad, z.grad, "gradient")
    return ours


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_the_oracle(backend, kind, dtype):
    for V in (8, 1000, 1001):  # 1001: rows that do not start at 16 bytes
        arguments = inputs(3, 5, V, dtype)
        check(arguments, backend, kind=kind)
        extra = {
            "rollout_logprobs": arguments[2] + 0.1 * torch.randn(3, 5), "rollout_correction": fastrlhf.RolloutCorrection("tis"), "kl_coef": 0.1,
            "ref_logprobs": arguments[2] - 0.2, "entropy_coef": 0.03, "temperature": 0.8, "clip_high": 0.28, "dual_clip": 3.0,
        }  # fmt: skip
        check(arguments, backend, kind=kind, **({} if kind == "gspo" else extra))


def test_reductions_and_masks(backend):
    logits, labels, old, advantages, mask = inputs(4, 6, 200, torch.float32)
    labels[1, 2:] = -100
    for reduction in reference.REDUCTIONS:
        check((logits, labels, old, advantages, mask & (labels != -100)), backend, reduction=reduction)
    out = check((logits, labels, old, advantages, None), backend)
    assert (out.logprobs[1, 2:] == 0).all()
    check((logits, labels, old, torch.randn(4), mask & (labels != -100)), backend, denominator=17.0)
    nothing = check((logits, labels, old, advantages, torch.zeros_like(mask)), backend)
    assert nothing.loss == 0
    packed = (logits.reshape(24, 200), labels.reshape(-1), old.reshape(-1), advantages.reshape(-1), mask.reshape(-1))
    cu = torch.tensor([0, 5, 5, 24])
    x = packed[0].clone().requires_grad_()
    a = fastrlhf.logits_policy_loss(x, *packed[1:], cu_seqlens=cu, backend=backend)
    b = fastrlhf.logits_policy_loss(logits, labels, old, advantages, mask, backend=backend)
    torch.testing.assert_close(a.loss, b.loss)


def test_more_columns_than_one_block_holds(compiled):
    """On a GPU 3 blocks or more hold such a row together, and the last slice is not full."""
    for V, dtype in ((70008, torch.float32), (128256, torch.bfloat16)):
        arguments = inputs(1, 5, V, dtype)
        check(arguments, compiled, entropy_coef=0.01)


def test_one_read(backend, monkeypatch):
    if backend != "cuda":
        pytest.skip("the other backends run the two ops")
    calls = []
    module = backends.cuda_extension()

    class Counting:
        def __getattr__(self, name):
            calls.append(name)
            return getattr(module, name)

    monkeypatch.setattr(backends, "_cuda", Counting())
    arguments = inputs(2, 3, 1000, torch.bfloat16)
    x = arguments[0].requires_grad_()
    fastrlhf.logits_policy_loss(x, *arguments[1:]).loss.backward()
    assert "one_read" in calls and "logprobs_backward" not in calls
    calls.clear()
    x.grad = None
    fastrlhf.logits_policy_loss(x, *arguments[1:], kind="gspo").loss.backward()
    assert "one_read" not in calls and "logprobs_backward" in calls


def test_a_graph_that_is_kept(backend):
    """Each backward's gradient is its own: the first is not changed by the second, and none is scaled by another's factor."""
    logits, *rest = inputs(2, 3, 16, torch.float32)
    x = logits.requires_grad_()
    loss = fastrlhf.logits_policy_loss(x, *rest, backend=backend).loss
    (one,) = torch.autograd.grad(loss, x, torch.tensor(1.0), retain_graph=True)
    for factor, kept in ((2.0, True), (3.0, True), (5.0, False)):
        before = one.clone()
        (g,) = torch.autograd.grad(loss, x, torch.tensor(factor), retain_graph=kept)
        torch.testing.assert_close(g, factor * one)
        assert torch.equal(one, before)
    loss = fastrlhf.logits_policy_loss(x, *rest, backend=backend).loss
    for _ in range(3):
        loss.backward(retain_graph=True)
    torch.testing.assert_close(x.grad, 3 * one)
