"""Where an op's launches go."""

from __future__ import annotations

import contextlib
import importlib

import pytest
import torch
from fastrlhf.ops.library import on_its_device

ROOMS = ("logprobs", "logits_policy_loss", "linear_logprobs", "linear_policy_loss")


class Elsewhere(torch.Tensor):
    """On the GPU that is not the current one, as far as Python can tell."""

    is_cuda, device = True, torch.device("cuda", 1)


@pytest.mark.parametrize("before", [(), (object(), None, True, "cuda")], ids=["first", "after others"])
def test_the_first_tensors_device_is_made_the_current_one(monkeypatch, before):
    entered = []

    @contextlib.contextmanager
    def device(d):
        entered.append(d)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    x = torch.zeros(3).as_subclass(Elsewhere)
    assert on_its_device(lambda *args: args[-1])(*before, x, 5) == 5
    assert entered == [torch.device("cuda", 1)]


@pytest.mark.parametrize("room", ROOMS)
def test_functions_of_their_own_launch_there_too(room):
    module = importlib.import_module(f"fastrlhf.ops.{room}")
    own = [v for v in vars(module).values() if isinstance(v, type) and issubclass(v, torch.autograd.Function)]
    assert own and all(hasattr(f.forward, "__wrapped__") for f in own)
