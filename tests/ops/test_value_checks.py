"""What tensors hold is looked at for kernels on a GPU only where FASTRLHF_CHECK=1 asks for it; without, a wrong value is
no crash. Shown on Triton's interpreter (`TRITON_INTERPRET=1`), whatever kernels the other tests run on."""

from __future__ import annotations

import os
import re

import fastrlhf as f
import pytest
import torch
from fastrlhf.ops import backend as backends

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
logits, labels = torch.randn(2, 5), torch.tensor([0, 4])
six, mask = torch.randn(6), torch.ones(6)
ROW = torch.tensor([0, 4, 2, 6])

CASES = {
    "label above": (lambda: f.logprobs(logits, torch.tensor([0, 5])), IndexError, "labels: 5 at flat position 1"),
    "label below": (lambda: f.logprobs(logits, torch.tensor([-1, 0])), IndexError, "labels: -1 at flat position 0"),
    "temperature": (
        lambda: f.logprobs(logits, labels, temperature=torch.tensor([1.0, 0.0])), ValueError, "temperature: every value",
    ),
    "kept set that falls": (
        lambda: f.logprobs(logits, labels, kept=(torch.tensor([0, 2, 1]), torch.tensor([0]))), ValueError, "kept: indptr",
    ),
    "kept column": (
        lambda: f.logprobs(logits, labels, kept=(torch.tensor([0, 1, 2]), torch.tensor([0, 5]))), IndexError, "kept: index 5",
    ),
    "lam": (lambda: f.gae(logits, logits, lam=torch.tensor([0.5, 1.5])), ValueError, "lam"),
    "gae": (lambda: f.gae(six, six, cu_seqlens=ROW), ValueError, "cu_seqlens: must"),
    "discounted_returns": (lambda: f.discounted_returns(six, cu_seqlens=ROW), ValueError, "cu_seqlens: must"),
    "shape_rewards": (
        lambda: f.shape_rewards(six[:3], six, six, mask, kl_coef=0.1, cu_seqlens=ROW), ValueError, "cu_seqlens: must",
    ),
    "sequence_logprobs": (lambda: f.sequence_logprobs(six, cu_seqlens=ROW), ValueError, "cu_seqlens: must"),
    "policy_loss": (
        lambda: f.policy_loss(six, six, six, mask, kind="gspo", cu_seqlens=ROW), ValueError, "cu_seqlens: must",
    ),
    "value_loss": (
        lambda: f.value_loss(six, six, six, mask, reduction="seq-mean-token-mean", cu_seqlens=ROW), ValueError,
        "cu_seqlens: must",
    ),
    "a row that cannot be sampled": (lambda: f.sample(logits * torch.nan, seed=0), ValueError, "logits: row 0"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    from tests import interpreter

    interpreter.repair()
    monkeypatch.setattr(backends, "_default", "triton")


@pytest.mark.parametrize("name", CASES)
def test_wrong_values_are_named_where_asked(monkeypatch, name):
    call, error, message = CASES[name]
    monkeypatch.setattr(backends, "CHECK", True)
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_an_unchecked_label_outside_the_vocabulary_is_minus_infinity(monkeypatch):
    monkeypatch.setattr(backends, "CHECK", False)
    x = logits.clone().requires_grad_()
    out = f.logprobs(x, torch.tensor([5, 2]), entropy=True)
    exact = torch.log_softmax(logits, -1)
    assert out.logprobs[0] == -torch.inf
    torch.testing.assert_close(out.logprobs[1], exact[1, 2])
    torch.testing.assert_close(out.entropy, -(exact.exp() * exact).sum(-1))
    out.logprobs.backward(torch.tensor([1.0, 2.0]))
    assert x.grad.isfinite().all()
    assert (f.logprobs(logits, torch.tensor([-7, 10**9])).logprobs == -torch.inf).all()
