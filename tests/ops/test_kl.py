from __future__ import annotations

import fastrlhf
import pytest
import torch
from fastrlhf.kernels.kl import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle import EXAMPLES, INTERPRETED, assert_accurate, assert_gradient_accurate

KINDS = reference.KINDS
DIRECTIONS = reference.DIRECTIONS


def check(lp, ref, backend, **options):
    tensors = []
    for dtype in (None, torch.float64, torch.float32):
        tensors.append([t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in (lp, ref)])
    ours = fastrlhf.kl(*tensors[0], backend=backend, **options)
    oracle, plain = (reference.kl(*t, **options) for t in tensors[1:])
    assert_accurate(ours, oracle, plain, "kl")
    g = torch.randn(ours.shape)
    for out in (ours, oracle, plain):
        out.backward(g.to(out.dtype))
    for a, b, c in zip(*tensors, strict=True):
        assert_gradient_accurate(a.grad, b.grad, c.grad, "gradient")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_estimators(backend, kind, dtype):
    lp, ref = -torch.rand(7, 1237) * 5, -torch.rand(7, 1237) * 5
    for options in ({}, {"clamp_input": 1.0}, {"clamp_output": 0.7}, {"straight_through": True},
                    {"clamp_input": 2.0, "clamp_output": 0.5, "straight_through": True}):  # fmt: skip
        check(lp.to(dtype), ref.to(dtype), backend, kind=kind, **options)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (2, 3, 5)])
def test_shapes(backend, shape):
    x = torch.randn(shape)
    assert fastrlhf.kl(x, x * 2, backend=backend).shape == shape


def test_k3_far_out(backend):
    """e^59 overflows nothing, and a clamp holds it (slime has none)."""
    d = torch.tensor([-59.0, -110.0, 80.0])
    out = fastrlhf.kl(d, torch.zeros(3), backend=backend)
    assert out[0] > 4e25 and out[1] == torch.inf and out[2] == 79.0
    held = fastrlhf.kl(d, torch.zeros(3), clamp_input=20.0, clamp_output=10.0, backend=backend)
    assert held.tolist() == [10.0, 10.0, 10.0]


def test_k3_of_nearly_equal_policies(backend):
    """e^-d - 1 + d cancels in float32; ours keeps its relative accuracy."""
    d = torch.logspace(-12, 0, 100)
    exact = torch.expm1(-d.double()) + d.double()
    series = d.double() ** 2 / 2 - d.double() ** 3 / 6
    exact = torch.where(d < 1e-4, series, exact)
    out = fastrlhf.kl(d, torch.zeros(100), backend=backend) if backend != "reference" else exact
    torch.testing.assert_close(out.double(), exact, rtol=2e-6, atol=0)


@pytest.mark.float64
def test_gradcheck(backend):
    lp, ref = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for kind in KINDS:
        assert torch.autograd.gradcheck(lambda a, b, k=kind: fastrlhf.kl(a, b, kind=k, backend=backend), (lp, ref))
    x, y = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.tensor([True, False, True])
    for direction in DIRECTIONS:
        assert torch.autograd.gradcheck(
            lambda a, b, d=direction: fastrlhf.kl_full(a, b, direction=d, temperature=0.8, mask=mask, backend=backend), (x, y)
        )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_full_against_the_oracle(backend, direction, dtype):
    for vocab in (1, 2, 129, 2048, 4099, 16411 if INTERPRETED else 32000):
        for offset, spread in ((0.0, 0.1), (30.0, 4.0)):
            x = (torch.randn(3, vocab) * 3 + offset).to(dtype)
            y = (x.float() + torch.randn(3, vocab) * spread - offset).to(dtype)
            tensors = [
                [t.detach().to(d or dtype, copy=True).requires_grad_() for t in (x, y)]
                for d in (None, torch.float64, torch.float32)
            ]
            outs = [fastrlhf.kl_full(*tensors[0], direction=direction, temperature=1.3, backend=backend)]
            outs += [reference.kl_full(*t, direction=direction, temperature=1.3) for t in tensors[1:]]
            assert_accurate(*outs, f"{direction} {vocab}")
            for out in outs:
                out.backward(torch.tensor([1.0, -2.0, 0.5], dtype=out.dtype))
            for a, b, c in zip(*tensors, strict=True):
                assert_gradient_accurate(a.grad, b.grad, c.grad, "gradient")


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_full_with_excluded_tokens(backend, direction):
    """-inf in both is nothing; -inf in one is infinite where the divergence says so."""
    x, y = torch.randn(3, 200), torch.randn(3, 200)
    x[:, :50] = y[:, :50] = -torch.inf
    out = fastrlhf.kl_full(x, y, direction=direction, backend=backend)
    short = fastrlhf.kl_full(x[:, 50:].contiguous(), y[:, 50:].contiguous(), direction=direction, backend=backend)
    torch.testing.assert_close(out, short, rtol=1e-5, atol=1e-6)
    y[0, 60] = -torch.inf
    one = fastrlhf.kl_full(x, y, direction=direction, backend=backend)[0]
    assert one == torch.inf if direction == "reverse" else one.isfinite()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_full_at_tiny_and_huge_temperatures(backend, direction):
    """The range that is documented."""
    x, y = torch.randn(3, 300), torch.randn(3, 300)
    for temperature in (1e-3, 1e-7, 1e-10, 1e-20, 1e20):
        out = fastrlhf.kl_full(x, y, direction=direction, temperature=temperature, backend=backend)
        oracle = reference.kl_full(x.double(), y.double(), direction=direction, temperature=temperature)
        torch.testing.assert_close(out.double(), oracle, rtol=1e-5, atol=1e-6)


def test_full_skips_masked_rows(backend):
    x, y = torch.randn(4, 300), torch.randn(4, 300)
    x[1] = torch.nan
    mask = torch.tensor([1, 0, 1, 0])
    a = x.clone().requires_grad_()
    out = fastrlhf.kl_full(a, y, mask=mask, backend=backend)
    assert out[1] == 0 and out[3] == 0 and out[0] > 0
    out.sum().backward()
    assert (a.grad[1] == 0).all() and (a.grad[3] == 0).all() and a.grad[2].abs().sum() > 0


def test_the_estimators_estimate_the_reverse_kl(backend):
    x, y = torch.randn(1, 20), torch.randn(1, 20)
    exact = fastrlhf.kl_full(x, y, direction="reverse", backend=backend)
    p, q = torch.log_softmax(x, -1), torch.log_softmax(y, -1)
    for kind in ("k1", "k3"):
        mean = (p.exp() * fastrlhf.kl(p, q, kind=kind, backend=backend)).sum(-1)
        torch.testing.assert_close(mean, exact, rtol=1e-5, atol=1e-6)


def test_controllers():
    fixed = fastrlhf.FixedKL(0.2)
    assert fixed.update(5.0, 64) == 0.2
    adaptive = fastrlhf.AdaptiveKL(0.2, target=6.0, horizon=10000)
    assert adaptive.update(60.0, 256) == pytest.approx(0.2 * (1 + 0.2 * 256 / 10000))
    assert adaptive.update(6.0, 256) == adaptive.coef
    with pytest.raises(ValueError, match="target"):
        fastrlhf.AdaptiveKL(0.2, target=0.0, horizon=1)


@settings(max_examples=EXAMPLES, deadline=None)
@given(n=st.integers(0, 5000), kind=st.sampled_from(KINDS), scale=st.floats(1e-6, 10), seed=st.integers(0, 2**31))
def test_hypothesis(n, kind, scale, seed):
    torch.manual_seed(seed)
    check(torch.randn(n) * scale, torch.randn(n) * scale, None, kind=kind)
