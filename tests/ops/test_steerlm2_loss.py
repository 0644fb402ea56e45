from __future__ import annotations

import fastrlhf
import pytest
import torch

from tests.oracle import assert_accurate

P, N = 5, 4


def case(dtype=torch.float32):
    """Sums over a few hundred tokens."""
    base = -300 - 50 * torch.rand(P, N, dtype=torch.float64)
    return [(base + torch.randn(P, N, dtype=torch.float64)).to(dtype) for _ in range(2)] + [
        (-torch.rand(P, N, dtype=torch.float64)).to(dtype), (base - 20 + torch.randn(P, N, dtype=torch.float64)).to(dtype)
    ]  # fmt: skip


def distance(q, proposal, attribute, prior):
    log_w, log_b = torch.log_softmax(attribute + prior - proposal, -1), torch.log_softmax(q - proposal, -1)
    return (log_w.exp() * (log_w - log_b)).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weighted_negative_log_likelihood(dtype):
    q, proposal, attribute, prior = (t.requires_grad_() for t in case(dtype))
    out = fastrlhf.steerlm2_loss(q, proposal, attribute, prior)
    wide = [t.detach().double() for t in (q, proposal, attribute, prior)]
    w, b = torch.softmax(wide[2] + wide[3] - wide[1], -1), torch.softmax(wide[0] - wide[1], -1)
    expected = -((w - b) * wide[0]).sum(-1)
    assert out.loss.dtype == out.losses.dtype == dtype
    assert_accurate(out.losses.float(), expected, expected.float(), "losses")
    assert_accurate(out.loss.float(), expected.mean(), expected.mean().float(), "loss")
    stats = out.stats.to_dict()
    assert stats["distance"] == pytest.approx(distance(*wide).mean().item(), rel=1e-5)
    assert stats["effective_responses"] == pytest.approx((1 / (w * w).sum(-1)).mean().item(), rel=1e-5)
    out.loss.backward()
    assert proposal.grad is attribute.grad is prior.grad is None
    torch.testing.assert_close(q.grad.double(), (b - w) / P, rtol=1e-5, atol=1e-7)


def test_its_gradient_is_the_divergences():
    inputs = case(torch.float64)
    grads = []
    for f in (lambda *t: fastrlhf.steerlm2_loss(*t).loss, lambda *t: distance(*t).mean()):
        q = inputs[0].clone().requires_grad_()
        f(q, *inputs[1:]).backward()
        grads.append(q.grad)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)


def test_nothing_to_learn_where_the_policy_is_optimal():
    _, proposal, attribute, prior = case(torch.float64)
    q = (attribute + prior + 3.0).requires_grad_()  # any constant a prompt: P(y|a,x) is normalised
    out = fastrlhf.steerlm2_loss(q, proposal, attribute, prior)
    out.loss.backward()
    assert out.stats.to_dict()["distance"] == pytest.approx(0, abs=1e-9) and q.grad.abs().max() < 1e-12


def test_missing_responses_may_hold_anything():
    inputs = case()
    mask = torch.ones(P, N, dtype=torch.bool)
    mask[1, 2:], mask[3] = False, False
    alone = fastrlhf.steerlm2_loss(*(t[1:2, :2] for t in inputs)).losses
    for t in inputs:
        t[~mask] = torch.nan
    q = inputs[0].requires_grad_()
    out = fastrlhf.steerlm2_loss(q, *inputs[1:], mask)
    out.loss.backward()
    assert torch.equal(out.losses[1:2], alone) and out.losses[3] == 0
    assert q.grad.isfinite().all() and not q.grad[~mask].any()
    assert all(map(torch.isfinite, out.stats.values))


def test_a_response_that_is_impossible_for_both_is_nothing():
    q, proposal, attribute, prior = (
        torch.tensor([[-5.0, -torch.inf]]),
        torch.zeros(1, 2),
        torch.tensor([[0.0, -torch.inf]]),
        torch.zeros(1, 2),
    )
    out = fastrlhf.steerlm2_loss(q.requires_grad_(), proposal, attribute, prior)
    out.loss.backward()
    assert out.loss == 0 and not q.grad.any() and out.stats.to_dict() == {"distance": 0, "effective_responses": 1}


def test_microbatches_add_up_to_the_batch():
    inputs = case()
    whole = fastrlhf.steerlm2_loss(*inputs).loss
    for denominator in (float(P), torch.tensor([float(P)], dtype=torch.float64)):
        parts = [
            fastrlhf.steerlm2_loss(*(t[rows] for t in inputs), denominator=denominator).loss
            for rows in (slice(0, 2), slice(2, P))
        ]
        torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-6)
    q = inputs[0].clone().requires_grad_()
    nothing = fastrlhf.steerlm2_loss(q, *inputs[1:], denominator=torch.tensor(0.0)).loss
    nothing.backward()
    assert nothing == 0 and not q.grad.any()
    assert fastrlhf.steerlm2_loss(*(t[:0] for t in inputs)).loss == 0
