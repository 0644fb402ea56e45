from __future__ import annotations

import fastrlhf
import pytest
import torch
import torch.nn.functional as F
from fastrlhf.kernels.preference_loss import reference

from tests.oracle import assert_accurate, gradcheck

KINDS = reference.KINDS
N = 37


def pairs(kind, dtype=torch.float32):
    scale = 0.5 if kind == "orpo" else 30
    c, r = -torch.rand(N) * scale - 0.01, -torch.rand(N) * scale - 0.01
    options = {"kind": kind, "beta": 0.3}
    ref = (None, None) if kind in ("simpo", "orpo") else (c + torch.randn(N) * 3, r + torch.randn(N) * 3)
    if kind.startswith("rpo"):
        options |= {"chosen_rewards": torch.rand(N) * 4, "rejected_rewards": torch.rand(N) * 4, "reward_scale": 0.7}
    if kind in ("dpo", "robust", "simpo"):
        options["label_smoothing"] = 0.1
    if kind == "simpo":
        options["margin"] = 0.4
    if kind == "kto":
        options |= {"kl_baseline": 0.2, "desirable_weight": 1.3, "undesirable_weight": 0.7}
    return [None if t is None else t.to(dtype) for t in (c, r, *ref)], options


def run(tensors, options, dtype, backend=None, definition=False):
    cast = [None if t is None else t.detach().to(dtype or t.dtype, copy=True) for t in tensors]
    cast[0].requires_grad_(), cast[1].requires_grad_()
    options = {k: v.to(dtype or v.dtype) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    losses = (
        reference.preference_losses(*cast, **options)
        if definition
        else fastrlhf.preference_loss(*cast, backend=backend, **options).losses
    )
    losses.backward(torch.linspace(-1, 2, N).to(losses.dtype))
    return losses, cast[0].grad, cast[1].grad


@pytest.mark.parametrize("kind", KINDS)
def test_against_the_oracle(backend, kind):
    tensors, options = pairs(kind)
    ours = run(tensors, options, None, backend)
    oracle = run(tensors, options, torch.float64, definition=True)
    plain = run(tensors, options, torch.float32, definition=True)
    for a, b, c in zip(ours, oracle, plain, strict=True):
        assert_accurate(a, b, c, kind)


@pytest.mark.float64
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(backend, kind):
    (c, r, *ref), options = pairs(kind, torch.float64)
    c, r = c.requires_grad_(), r.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, y: (
            fastrlhf.preference_loss(
                x, y, *ref, sft_coef=0.3, chosen_lengths=torch.arange(1, N + 1), backend=backend, **options
            ).loss
        ),
        (c, r),
    )


def test_what_the_papers_say(backend):
    """Formulas by hand, for one pair."""
    c, r, rc, rr = (torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.5))
    x = 0.1 * ((-10 + 11) - (-12 + 11.5))
    sig = torch.sigmoid(torch.tensor(x))

    def loss(kind, **options):
        return float(fastrlhf.preference_loss(c, r, rc, rr, kind=kind, backend=backend, **options).loss)

    assert loss("dpo") == pytest.approx(float(-sig.log()))
    assert loss("spin") == loss("dpo")
    assert loss("cdpo", label_smoothing=0.2) == pytest.approx(float(-0.8 * sig.log() - 0.2 * (1 - sig).log()))
    assert loss("ipo") == pytest.approx((1.5 - 5) ** 2)
    assert loss("hinge") == pytest.approx(1 - x)
    rewards = {"chosen_rewards": torch.tensor([1.0]), "rejected_rewards": torch.tensor([0.0])}
    p, q = sig, torch.sigmoid(torch.tensor(1.0))
    forward = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    backward = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    assert loss("rpo_sq", **rewards) == pytest.approx((x - 1) ** 2)
    assert loss("rpo_fwd_kl", **rewards) == pytest.approx(float(forward), rel=1e-4)
    assert loss("rpo_bwd_kl", **rewards) == pytest.approx(float(backward), rel=1e-4)
    assert loss("kto") == pytest.approx(0.5 * (2 - float(torch.sigmoid(torch.tensor(0.1)) + torch.sigmoid(torch.tensor(0.05)))))


def test_statistics_denominator_and_sft_term(backend):
    (c, r, rc, rr), options = pairs("dpo")
    out = fastrlhf.preference_loss(c, r, rc, rr, sft_coef=0.5, chosen_lengths=torch.full((N,), 4), backend=backend, **options)
    s = out.stats.to_dict()
    assert s["accuracy"] == pytest.approx(float(((c - rc) > (r - rr)).float().mean()))
    assert s["margin"] == pytest.approx(float(0.3 * ((c - rc) - (r - rr)).mean()), rel=1e-4)
    assert float(out.loss) == pytest.approx(float(out.losses.mean() + 0.5 * (-c / 4).mean()), rel=1e-5)
    parts = [
        fastrlhf.preference_loss(*(t[i] for t in (c, r, rc, rr)), denominator=N, backend=backend, **options).loss
        for i in (slice(0, 5), slice(5, N))
    ]
    whole = fastrlhf.preference_loss(c, r, rc, rr, backend=backend, **options).loss
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("op", ["preference_loss", "reward_loss"])
def test_denominators_in_a_tensor(backend, op):
    """Of any shape with one element; 0 where it is 0, as a rank without pairs may have it."""
    pairs = [torch.randn(5) for _ in range(4)]
    rest, options = ((), {}) if op == "reward_loss" else (pairs[2:], {"kind": "dpo", "sft_coef": 0.5})
    mean = getattr(fastrlhf, op)(*pairs[:2], *rest, backend=backend, **options).loss
    for denominator, expected in ((torch.tensor([10.0]), mean / 2), (torch.tensor(0.0), torch.zeros(()))):
        c, r = (t.clone().requires_grad_() for t in pairs[:2])
        loss = getattr(fastrlhf, op)(c, r, *rest, denominator=denominator, backend=backend, **options).loss
        torch.testing.assert_close(loss.detach(), expected)
        loss.backward()
        assert c.grad.isfinite().all() and c.grad.any() == r.grad.any() == bool(denominator != 0)


def test_extreme_margins_are_finite(backend):
    c = torch.tensor([1e4, -1e4]).requires_grad_()
    out = fastrlhf.preference_loss(c, -c.detach(), torch.zeros(2), torch.zeros(2), kind="dpo", beta=1.0, backend=backend)
    out.loss.backward()
    assert out.losses.tolist() == [0.0, 2e4] and c.grad.isfinite().all()


def test_no_pairs(backend):
    empty = torch.empty(0, requires_grad=True)
    out = fastrlhf.preference_loss(empty, empty, empty.detach(), empty.detach(), kind="dpo", backend=backend)
    assert out.loss == 0 and out.stats.values.isfinite().all()
    assert fastrlhf.reward_loss(empty, empty, backend=backend).loss == 0
    assert fastrlhf.regression_loss(empty, empty.detach(), backend=backend).loss == 0


@pytest.mark.parametrize("kind", reference.REWARD_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reward_loss(backend, kind, dtype):
    c, r, m = (torch.randn(N).to(dtype) for _ in range(3))
    margin = None if kind == "bt" else m.abs()
    a, b = c.clone().requires_grad_(), r.clone().requires_grad_()
    out = fastrlhf.reward_loss(a, b, margin, kind=kind, backend=backend)
    oracle = reference.reward_losses(c.double(), r.double(), None if margin is None else margin.double(), kind=kind)
    torch.testing.assert_close(out.losses.double(), oracle, rtol=1e-6, atol=1e-6)
    assert out.losses.dtype == torch.float32
    out.loss.backward()
    assert a.grad.dtype == dtype and torch.allclose(a.grad, -b.grad)
    assert out.stats.to_dict()["accuracy"] == pytest.approx(float((c > r).float().mean()))
    x, y = (t.double().requires_grad_() for t in (c, r))
    margin = None if margin is None else margin.double()
    assert gradcheck(backend, lambda p, q: fastrlhf.reward_loss(p, q, margin, kind=kind, backend=backend).loss, (x, y))


def test_regression_loss(backend):
    p, t = torch.randn(8, 5), torch.randn(8, 5)
    t[torch.rand(8, 5) < 0.4] = -100
    keep = t != -100
    x = p.clone().requires_grad_()
    out = fastrlhf.regression_loss(x, t, backend=backend)
    torch.testing.assert_close(out.loss, F.mse_loss(p[keep], t[keep]), rtol=1e-5, atol=1e-6)
    out.loss.backward()
    assert (x.grad[~keep] == 0).all()
    s = out.stats.to_dict()
    assert s["count"] == int(keep.sum()) and s["mae"] == pytest.approx(float((p - t)[keep].abs().mean()), rel=1e-5)
    assert fastrlhf.regression_loss(p, torch.full((8, 5), -100.0), backend=backend).loss == 0
    y = p.double().requires_grad_()
    assert gradcheck(backend, lambda q: fastrlhf.regression_loss(q, t.double(), backend=backend).loss, y)


@pytest.mark.parametrize("average", [False, True])
def test_sequence_logprobs(backend, average):
    lp, mask = -torch.rand(6, 900), torch.rand(6, 900) < 0.5
    mask[2] = False
    lp[2] = torch.nan
    out = fastrlhf.sequence_logprobs(lp, mask, average=average, backend=backend)
    clean = lp.nan_to_num()
    oracle = reference.sequence_logprobs(clean.double(), mask, average=average)
    assert_accurate(out, oracle, reference.sequence_logprobs(clean, mask, average=average))
    assert out[2] == 0
    lengths = torch.tensor([0, 5, 1, 0, 894 + 4500])
    cu = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    packed = fastrlhf.sequence_logprobs(clean.reshape(-1), cu_seqlens=cu, average=average, backend=backend)
    oracle = reference.sequence_logprobs(clean.reshape(-1).double(), cu_seqlens=cu, average=average)
    assert_accurate(packed, oracle, reference.sequence_logprobs(clean.reshape(-1), cu_seqlens=cu, average=average))
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    keep = torch.rand(4, 6) < 0.6
    assert gradcheck(backend, lambda t: fastrlhf.sequence_logprobs(t, keep, average=average, backend=backend), x)
    y = torch.randn(10, dtype=torch.float64, requires_grad=True)
    cu = torch.tensor([0, 3, 3, 10])
    assert gradcheck(backend, lambda t: fastrlhf.sequence_logprobs(t, cu_seqlens=cu, average=average, backend=backend), y)
