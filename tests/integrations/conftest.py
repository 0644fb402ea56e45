"""A framework of two modules, on disk: one defines functions, the other imports them by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from fastrlhf import ops
from fastrlhf.integrations import patching
from fastrlhf.integrations.seam import Call, Entry, Host, Seam, Sizes, in_place_of

FUNCTIONS = """
import torch
REGISTRY = {}
def register(f):
    REGISTRY["logprobs"] = f
    return f
@register
def logprobs(logits, labels):
    "The host's."
    return torch.log_softmax(logits, -1).gather(-1, labels[:, None])[:, 0]
def wrong(logits, labels):
    return logprobs(logits, labels) + 1e-2
class Loss:
    def forward(self, x, mask):
        return (x * mask).sum() / mask.sum()
"""
TRAINER = "from toyhost.functions import Loss, logprobs\nfrom toyhost.functions import logprobs as another_name\n"


def build(original):
    @in_place_of(original)
    def replacement(logits, labels):
        return ops.logprobs(logits, labels).logprobs

    return replacement


def build_forward(original):
    @in_place_of(original)
    def forward(self, x, mask):
        return ops.masked_mean(x, mask)

    return forward


def calls(sizes: Sizes) -> Iterator[Call]:
    x = torch.linspace(-3, 3, sizes.rows * sizes.vocab).view(sizes.rows, sizes.vocab).sin() * 4
    yield Call("sines", (x, torch.arange(sizes.rows)), grads=(0,))


def mean_calls(sizes: Sizes) -> Iterator[Call]:
    yield Call("some", (None, torch.arange(6.0), torch.tensor([1.0, 0, 1, 1, 0, 1])), grads=(1,))


SEAMS = (
    Seam("toyhost.functions", "logprobs", build, calls, "logprobs", ("REGISTRY",)),
    Seam("toyhost.functions", "wrong", build, calls, "logprobs"),
    Seam("toyhost.functions", "Loss.forward", build_forward, mean_calls, "masked_mean"),
    Seam("toyhost.functions", "gone", build, calls, "logprobs"),
    Seam("toyhost.functions", "logprobs", build, calls, "an_op_to_come"),
    Seam("toyhost.late", "logprobs", build, calls, "logprobs", on_import=True),
    Entry("toyhost.functions", "REGISTRY", "fastrlhf_logprobs", build, "logprobs", "logprobs", calls),
)
HOST = Host("toyhost", "toyhost", "toyhost", ("1.0", "1.2"), (*SEAMS[:4], *SEAMS[5:]))


@pytest.fixture
def toyhost(tmp_path, monkeypatch) -> Iterator[Host]:
    package = tmp_path / "toyhost"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '1.1'\n")
    (package / "functions.py").write_text(FUNCTIONS)
    (package / "trainer.py").write_text(TRAINER)
    (package / "late.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    yield HOST
    patching.remove(HOST)
    for name in [n for n in sys.modules if n == "toyhost" or n.startswith("toyhost.")]:
        del sys.modules[name]
