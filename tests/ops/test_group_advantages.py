from __future__ import annotations

import fastrlhf
import pytest
import torch
from fastrlhf.kernels.group_advantages import reference

KINDS = reference.KINDS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.float64)], ids=str
)
def test_against_the_oracle(backend, kind, dtype):
    for count in (1, 2, 7, 400):
        scores, ids = torch.randn(count).to(dtype), torch.randint(-3, 40, (count,)) * 10**12
        lengths = torch.randint(1, 100, (count,))
        for unbiased in (True, False):
            out = fastrlhf.group_advantages(scores, ids, kind=kind, lengths=lengths, unbiased=unbiased, backend=backend)
            oracle = reference.group_advantages(scores.double(), ids, kind=kind, lengths=lengths, unbiased=unbiased)
            assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(out.double(), oracle, rtol=1e-5, atol=2e-6)


def test_by_hand(backend):
    scores, ids = torch.tensor([1.0, 5.0, 3.0, 7.0]), torch.tensor([4, 9, 4, 2])

    def advantages(kind, **options):
        return fastrlhf.group_advantages(scores, ids, kind=kind, backend=backend, **options)

    torch.testing.assert_close(advantages("dr_grpo"), torch.tensor([-1.0, 0.0, 1.0, 0.0]))
    torch.testing.assert_close(advantages("rloo"), torch.tensor([-2.0, 5.0, 2.0, 7.0]))
    root = 2**0.5
    torch.testing.assert_close(advantages("grpo"), torch.tensor([-1 / root, 5.0, 1 / root, 7.0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(advantages("opo", lengths=torch.tensor([3, 1, 1, 1])), torch.tensor([-0.5, 0.0, 1.5, 0.0]))
    white = advantages("reinforce++")
    assert abs(float(white.mean())) < 1e-6 and float(white.std()) == pytest.approx(1, rel=1e-5)


def test_equal_scores_and_nothing(backend):
    scores, ids = torch.full((6,), 2.5), torch.tensor([0, 0, 0, 1, 1, 1])
    for kind in KINDS:
        for eps in (1e-6, 0.0):
            out = fastrlhf.group_advantages(scores, ids, kind=kind, eps=eps, lengths=torch.ones(6), backend=backend)
            assert torch.equal(out, torch.zeros(6))
        assert fastrlhf.group_advantages(scores[:0], ids[:0], kind=kind, lengths=torch.ones(0), backend=backend).shape == (0,)


def test_order_does_not_matter(backend):
    scores, ids = torch.randn(50), torch.randint(0, 7, (50,))
    order = torch.randperm(50)
    for kind in ("grpo", "rloo", "dr_grpo"):
        a = fastrlhf.group_advantages(scores, ids, kind=kind, backend=backend)
        b = fastrlhf.group_advantages(scores[order], ids[order].int(), kind=kind, backend=backend)
        torch.testing.assert_close(a[order], b)
