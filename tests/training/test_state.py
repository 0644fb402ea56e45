"""Modules, optimizers and generators: what is put back behaves as what was taken."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from fastrlhf.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    load_into,
    load_optimizer,
    optimizer_tensors,
    restore_rng,
    rng_tensors,
)
from torch import nn


def model(seed: int, width: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1))


def optimizer(module: nn.Module, kind: str = "adamw", reverse: bool = False) -> torch.optim.Optimizer:
    decay, rest = [p for p in module.parameters() if p.dim() == 2], [p for p in module.parameters() if p.dim() == 1]
    groups = [{"params": decay[::-1] if reverse else decay, "weight_decay": 0.1}, {"params": rest, "lr": 0.02}]
    kinds = {
        "adamw": lambda g: torch.optim.AdamW(g, lr=0.01, amsgrad=True),
        "sgd": lambda g: torch.optim.SGD(g, lr=0.01, momentum=0.9),
    }
    return kinds[kind](groups)


def train(module: nn.Module, opt: torch.optim.Optimizer, steps: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        opt.zero_grad()
        module(torch.randn(5, 3, generator=g)).square().sum().backward()
        opt.step()


def weights(module: nn.Module) -> list[float]:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()]).tolist()


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("reverse", [False, True])
def test_training_goes_on_bitwise(kind, reverse, tmp_path):
    first = model(0)
    opt = optimizer(first, kind)
    train(first, opt, 3, 1)
    tensors, state = optimizer_tensors(opt, dict(first.named_parameters()))
    path = Checkpoints(tmp_path).save(3, {"policy": first.state_dict(), "optimizer": tensors}, {"optimizer": state})
    train(first, opt, 3, 2)

    second = model(9)
    loaded, states = Checkpoints(tmp_path).load(path)
    load_into(second, loaded["policy"], "policy")
    other = optimizer(second, kind, reverse)
    load_optimizer(other, dict(second.named_parameters()), loaded["optimizer"], states["optimizer"])
    train(second, other, 3, 2)
    assert weights(second) == weights(first)


def test_without_the_optimizer_it_would_not():
    """The test above can fail: a fresh optimizer gives other weights."""
    results = []
    for fresh in (False, True):
        m = model(0)
        opt = optimizer(m)
        train(m, opt, 3, 1)
        train(m, optimizer(m) if fresh else opt, 3, 2)
        results.append(weights(m))
    assert results[0] != results[1]


def test_a_parameter_without_gradient_has_no_state():
    m = model(0)
    other = optimizer(m)
    train(m, other, 2, 0)
    m.zero_grad()
    next(iter(m.parameters())).requires_grad_(False)
    opt = optimizer(m)
    train(m, opt, 1, 0)
    tensors, state = optimizer_tensors(opt, dict(m.named_parameters()))
    assert not any(name.startswith("0.weight") for name in tensors) and "2.bias.exp_avg" in tensors
    load_optimizer(other, dict(m.named_parameters()), tensors, state)
    assert set(optimizer_tensors(other, dict(m.named_parameters()))[0]) == set(tensors)


def test_state_keeps_its_dtype():
    m = model(0).bfloat16()
    opt = torch.optim.AdamW(m.parameters())
    for p in m.parameters():
        opt.state[p] = {"step": torch.tensor(3.0), "exp_avg": torch.randn(p.shape), "exp_avg_sq": torch.rand(p.shape)}
    tensors, state = optimizer_tensors(opt, dict(m.named_parameters()))
    load_optimizer(opt, dict(m.named_parameters()), tensors, state)
    assert opt.state[next(m.parameters())]["exp_avg"].dtype == torch.float32
    assert opt.state[next(m.parameters())]["exp_avg"].data_ptr() != tensors["0.weight.exp_avg"].data_ptr()


def test_options_are_those_of_the_optimizer_that_goes_on():
    m = model(0)
    tensors, state = optimizer_tensors(torch.optim.AdamW(m.parameters(), lr=0.5, weight_decay=0.1), dict(m.named_parameters()))
    opt = torch.optim.AdamW(m.parameters(), lr=0.1, betas=(0.8, 0.9))
    before = {k: v for k, v in opt.param_groups[0].items() if k != "params"}
    load_optimizer(opt, dict(m.named_parameters()), tensors, state)
    assert before == {k: v for k, v in opt.param_groups[0].items() if k != "params"}


def test_another_shape_is_refused_before_anything_changes():
    saved, other = model(0), model(1, width=5)
    before = weights(other)
    with pytest.raises(CheckpointError, match=r"policy: 0.weight has shape \(4, 3\) in the checkpoint, expected \(5, 3\)"):
        load_into(other, saved.state_dict(), "policy")
    late = {k: v for k, v in other.state_dict().items()} | {"2.bias": torch.zeros(7)}
    late = {k: v + 1 if k != "2.bias" else v for k, v in late.items()}
    with pytest.raises(CheckpointError, match=r"2.bias has shape \(7,\) in the checkpoint, expected \(1,\)"):
        load_into(other, late)
    assert weights(other) == before


def test_other_names_are_refused():
    m = model(0)
    tensors = m.state_dict()
    with pytest.raises(CheckpointError, match=r"critic: 2.bias is missing in the checkpoint$"):
        load_into(m, {k: v for k, v in tensors.items() if k != "2.bias"}, "critic")
    with pytest.raises(CheckpointError, match=r"critic: x of the checkpoint is unknown here, and 1 more"):
        load_into(m, tensors | {"x": torch.zeros(1), "y": torch.zeros(1)}, "critic")


def test_a_mapping_of_tensors_as_target():
    own = {"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.bfloat16)}
    load_into(own, {"a": torch.ones(2), "b": torch.ones(2)})
    assert own["a"].tolist() == [1, 1] and own["b"].tolist() == [1, 1] and own["b"].dtype == torch.bfloat16


def test_an_optimizer_of_another_shape_is_refused():
    saved, other = model(0), model(0, width=5)
    opt = optimizer(saved)
    train(saved, opt, 1, 0)
    tensors, state = optimizer_tensors(opt, dict(saved.named_parameters()))
    target = optimizer(other)
    train(other, target, 1, 0)
    before = {k: v.clone() for k, v in optimizer_tensors(target, dict(other.named_parameters()))[0].items()}
    with pytest.raises(
        CheckpointError, match=r"optimizer: 0.weight.exp_avg has shape \(4, 3\) in the checkpoint, expected \(5, 3\)"
    ):
        load_optimizer(target, dict(other.named_parameters()), tensors, state)
    del tensors["2.bias.exp_avg_sq"]
    with pytest.raises(CheckpointError, match=r"optimizer: 2.bias.exp_avg_sq is missing in the checkpoint"):
        load_optimizer(optimizer(saved), dict(saved.named_parameters()), tensors, state)
    after = optimizer_tensors(target, dict(other.named_parameters()))[0]
    assert all(torch.equal(before[k], after[k]) for k in before)
    with pytest.raises(
        CheckpointError, match=r"optimizer: the checkpoint has 2 groups of \[2, 2\] parameters, expected 1 of \[4\]"
    ):
        load_optimizer(torch.optim.AdamW(saved.parameters()), dict(saved.named_parameters()), tensors, state)
    with pytest.raises(CheckpointError, match=r"a parameter of shape \(1,\) in group 1 has no name"):
        optimizer_tensors(opt, {k: v for k, v in saved.named_parameters() if k != "2.bias"})


def draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.randn(),
        torch.rand(()).item(),
        torch.randn(()).item(),
    ]


@pytest.mark.parametrize("odd", [False, True])
def test_generators_go_on_where_they_were(odd, tmp_path):
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    if odd:  # a second normal number is in store
        draw()
    path = Checkpoints(tmp_path).save(0, {"rng": rng_tensors()}, {})
    expected = [draw() for _ in range(3)]
    assert [draw() for _ in range(3)] != expected
    restore_rng(Checkpoints(tmp_path).load(path)[0]["rng"])
    assert [draw() for _ in range(3)] == expected


def test_a_generator_that_is_missing():
    tensors = rng_tensors()
    del tensors["numpy"]
    before = torch.get_rng_state()
    torch.rand(5)
    with pytest.raises(CheckpointError, match="rng: numpy is missing in the checkpoint"):
        restore_rng(tensors)
    assert not torch.equal(torch.get_rng_state(), before)
