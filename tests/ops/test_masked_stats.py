from __future__ import annotations

import fastrlhf
import pytest
import torch
from fastrlhf.kernels.masked_stats import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle import EXAMPLES, INTERPRETED, assert_accurate

FUNCTIONS = [
    (fastrlhf.masked_mean, reference.masked_mean, {}),
    (fastrlhf.masked_mean, reference.masked_mean, {"dim": 1}),
    (fastrlhf.masked_mean, reference.masked_mean, {"dim": 0}),
    (fastrlhf.masked_var, reference.masked_var, {}),
    (fastrlhf.masked_var, reference.masked_var, {"unbiased": False}),
    (fastrlhf.whiten, reference.whiten, {}),
    (fastrlhf.whiten, reference.whiten, {"shift_mean": False, "unbiased": False, "eps": 1e-5}),
]


@pytest.mark.parametrize(("function", "definition", "options"), FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_the_oracle(backend, function, definition, options, dtype):
    for shape in ((3, 5), (1, 1), (4, 5000), (700, 13)):
        x = torch.randn(shape).to(dtype)
        for mask in (None, torch.rand(shape) < 0.5, torch.rand(shape), torch.ones(shape, dtype=torch.int64)):
            ours = function(x, mask, backend=backend, **options)
            wide = mask.double() if mask is not None else None
            assert_accurate(ours, definition(x.double(), wide, **options), definition(x.float(), mask, **options), str(options))


def test_a_large_mean_costs_no_precision(backend):
    """Σx² - (Σx)²/n would lose everything at 1e4 ± 1."""
    x, mask = torch.randn(1000, 100) + 1e4, torch.rand(1000, 100) < 0.5
    exact = x.double()[mask].var()
    torch.testing.assert_close(fastrlhf.masked_var(x, mask, backend=backend).double(), exact, rtol=2e-6, atol=0)
    white = fastrlhf.whiten(x, mask, backend=backend)[mask].double()
    assert abs(float(white.mean())) < 1e-3 and abs(float(white.std()) - 1) < 1e-4


def test_whiten_shifts_the_mean_away(backend):
    """torchtune adds it back where it says it does not."""
    x = torch.randn(10, 10) + 5
    assert abs(float(fastrlhf.whiten(x, None, backend=backend).mean())) < 1e-5
    assert abs(float(fastrlhf.whiten(x, None, shift_mean=False, backend=backend).mean()) - float(x.mean())) < 1e-4


@pytest.mark.parametrize("shape", [(0,), (3, 0), (4, 7)])
def test_nothing_counted(backend, shape):
    """Never NaN (NeMo-Aligner #57), whatever lies under the mask."""
    x = torch.full(shape, torch.nan)
    mask = torch.zeros(shape, dtype=torch.bool)
    assert fastrlhf.masked_mean(x, mask, backend=backend) == 0
    assert fastrlhf.masked_var(x, mask, backend=backend) == 0
    assert torch.equal(fastrlhf.whiten(x, mask, backend=backend), torch.zeros(shape))
    mean = fastrlhf.masked_mean(x, mask, -1, backend=backend)
    assert torch.equal(mean, torch.zeros(shape[:-1]))


@pytest.mark.float64
def test_gradcheck(backend):
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, 6, dtype=torch.float64)
    weights[weights < 0.3] = 0
    for mask in (None, weights != 0):
        for dim in (None, 0, 1):
            assert torch.autograd.gradcheck(lambda t, m=mask, d=dim: fastrlhf.masked_mean(t, m, d, backend=backend), x)
        for unbiased in (True, False):
            assert torch.autograd.gradcheck(
                lambda t, m=mask, u=unbiased: fastrlhf.masked_var(t, m, unbiased=u, backend=backend), x
            )
            for shift in (True, False):
                assert torch.autograd.gradcheck(
                    lambda t, m=mask, u=unbiased, s=shift: fastrlhf.whiten(t, m, unbiased=u, shift_mean=s, backend=backend), x
                )
    assert torch.autograd.gradcheck(lambda t: fastrlhf.masked_mean(t, weights, backend=backend), x)
    assert torch.autograd.gradcheck(lambda t: fastrlhf.masked_var(t, weights, unbiased=False, backend=backend), x)


def test_run_twice(compiled):
    rows = 40 if INTERPRETED else 300
    x, mask = torch.randn(rows, 999), torch.rand(rows, 999) < 0.4
    before = torch.get_num_threads()
    outs = []
    for n in (1, 2) if INTERPRETED else (1, 2, 3, 2):
        torch.set_num_threads(n)
        outs.append((fastrlhf.whiten(x, mask), fastrlhf.masked_mean(x, mask), fastrlhf.masked_mean(x, mask, 1)))
    torch.set_num_threads(before)
    for other in outs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outs[0], other, strict=True))


@settings(max_examples=EXAMPLES, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 700), seed=st.integers(0, 2**31), shift=st.sampled_from([0.0, 1e3]))
def test_hypothesis(rows, columns, seed, shift):
    torch.manual_seed(seed)
    x, mask = torch.randn(rows, columns) + shift, torch.rand(rows, columns) < 0.5
    for function, definition, options in FUNCTIONS:
        assert_accurate(function(x, mask, **options), definition(x.double(), mask, **options), definition(x, mask, **options))
