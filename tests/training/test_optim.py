"""AdamW as torch's, on float32 copies where the weights are not; schedules; what is not finite changes nothing."""

from __future__ import annotations

import pytest
import torch
from fastrlhf.training.optim import NotFinite, Optimizer, OptimizerConfig
from torch import nn


def optimizer(p: torch.Tensor, total: int = 10, **options: object) -> tuple[Optimizer, nn.Parameter]:
    weight = nn.Parameter(p)
    return Optimizer({"w": weight}, OptimizerConfig(**options), total), weight  # type: ignore[arg-type]


def test_it_is_torchs_adamw() -> None:
    start = torch.randn(4, 3)
    ours, w = optimizer(start.clone(), lr=0.1, weight_decay=0.2, grad_clip=None, betas=[0.8, 0.9])
    theirs = nn.Parameter(start.clone())
    reference = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.2, betas=(0.8, 0.9))
    for _ in range(5):
        grad = torch.randn(4, 3)
        w.grad, theirs.grad = grad.clone(), grad.clone()
        assert ours.step("test")["grad_norm"] == pytest.approx(float(grad.norm()))
        reference.step()
        torch.testing.assert_close(w, theirs)
    assert w.grad is None


def test_small_steps_are_not_lost_in_bfloat16_and_are_restored() -> None:
    ours, w = optimizer(torch.ones(8, 8, dtype=torch.bfloat16), lr=1e-5, grad_clip=None)
    for _ in range(400):
        w.grad = torch.ones(8, 8, dtype=torch.bfloat16)
        ours.step("test")
    assert w.dtype == torch.bfloat16 and float(w.detach()[0, 0]) < 1  # each step alone rounds to nothing
    tensors, state = ours.save()
    again, v = optimizer(w.detach().clone(), lr=1e-5, grad_clip=None)
    again.load(tensors, state)
    for o, p in ((ours, w), (again, v)):
        for _ in range(300):
            p.grad = torch.ones(8, 8, dtype=torch.bfloat16)
            o.step("test")
    assert torch.equal(w, v) and torch.equal(ours.masters["w"], again.masters["w"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"schedule": "constant", "warmup_steps": 2}, [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ({"schedule": "linear", "min_lr_ratio": 0.0}, [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]),
        ({"schedule": "linear", "min_lr_ratio": 0.5}, [1.0, 0.95, 0.9, 0.85, 0.8, 0.75]),
        ({"schedule": "cosine", "min_lr_ratio": 0.0}, [1.0, 0.975528, 0.904508, 0.793893, 0.654508, 0.5]),
    ],
)
def test_schedules(options: dict[str, object], expected: list[float]) -> None:
    ours, w = optimizer(torch.zeros(2, 2), lr=1.0, **options)
    seen = []
    for _ in expected:
        w.grad = torch.ones(2, 2)
        seen.append(ours.step("test")["lr"])
    assert seen == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_changes_no_weight(bad: float) -> None:
    ours, w = optimizer(torch.ones(2, 2), lr=1.0)
    w.grad = torch.tensor([[1.0, bad], [1.0, 1.0]])
    with pytest.raises(NotFinite, match=r"policy: .*no weight was changed"):
        ours.step("policy")
    w.grad = torch.ones(2, 2)
    with pytest.raises(NotFinite, match="the loss is nan"):
        ours.step("policy", torch.tensor(float("nan")))
    assert torch.equal(w.detach(), torch.ones(2, 2)) and ours.steps == 0 and w.grad is None


def test_gradients_are_clipped_by_their_norm_and_norms_do_not_decay() -> None:
    matrix, norm = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    ours = Optimizer({"m": matrix, "n": norm}, OptimizerConfig(lr=0.1, weight_decay=1.0, grad_clip=1.0), 1)
    matrix.grad, norm.grad = torch.zeros(2, 2), torch.zeros(2)
    ours.step("test")
    assert torch.allclose(matrix, torch.full((2, 2), 0.9)) and torch.equal(norm.detach(), torch.ones(2))
