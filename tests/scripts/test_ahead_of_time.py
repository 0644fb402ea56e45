"""scripts/ahead_of_time.py: what it records of a launch is what Triton's launcher would compile."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import fastrlhf
import pytest
import torch
from fastrlhf.ops import backend as backends

from tests.oracle import INTERPRETED

pytest.importorskip("triton")


@pytest.mark.skipif(INTERPRETED, reason="kernels that are interpreted are not compiled")
def test_only_multiples_of_16_are_marked_as_such(monkeypatch):
    spec = importlib.util.spec_from_file_location("ahead_of_time", Path(__file__).parents[2] / "scripts" / "ahead_of_time.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "ahead_of_time", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(backends, "_recorded", True)
    backends._obstacle.cache_clear()

    def divisible(vocab):
        x = torch.zeros(2, vocab, dtype=torch.bfloat16)
        labels = torch.zeros(2, dtype=torch.long)
        (variant,) = module.variants(lambda: fastrlhf.logprobs(x, labels, backend="triton"), 90)
        return {dict(enumerate(dict(variant.signature)))[path[0]] for path in variant.divisible}

    assert divisible(128256) - divisible(50257) == {"vocab", "inner_stride"} and "logits" in divisible(50257)
    backends._obstacle.cache_clear()
