"""TRL's GRPO loss and ours in its place: value, gradient and every metric."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")
from accelerate import Accelerator
from fastrlhf.integrations import seam
from fastrlhf.integrations.trl import fused_loss
from trl import GRPOTrainer


def trainer(kind: type, **options):
    """One without its model: what the loss reads of it, and log-probs that are given."""
    made = object.__new__(kind)
    args = SimpleNamespace(delta=options.pop("delta", None), use_bias_correction_kl=False, steps_per_generation=2)
    vars(made).update(
        loss_type="dapo", importance_sampling_level="token", top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        _entropy_bonus_enabled=False, aux_loss_enabled=False, use_vllm=False, vllm_importance_sampling_correction=False,
        args=args, epsilon_low=0.2, epsilon_high=0.28, beta=0.0, max_completion_length=12, accelerator=Accelerator(cpu=True),
        current_gradient_accumulation_steps=3, _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        model=SimpleNamespace(training=True),
    )  # fmt: skip
    vars(made).update(options)
    return made


def inputs(B=4, T=9):
    draw = torch.Generator().manual_seed(0)
    mask = (torch.rand(B, T, generator=draw) < 0.7).long()
    mask[:, 0] = 1
    old = -torch.rand(B, T, generator=draw)
    given = {
        "prompt_ids": torch.zeros(B, 2, dtype=torch.long), "prompt_mask": torch.ones(B, 2, dtype=torch.long),
        "completion_ids": torch.zeros(B, T, dtype=torch.long), "completion_mask": mask, "old_per_token_logps": old,
        "advantages": torch.randn(B, generator=draw), "ref_per_token_logps": old + torch.randn(B, T, generator=draw) * 0.2,
        "num_items_in_batch": torch.tensor(40.0),
    }  # fmt: skip
    return given, old + torch.randn(B, T, generator=draw) * 0.4, torch.rand(B, T, generator=draw)


def run(kind, options, change=lambda given: None):
    given, logprobs, entropy = inputs()
    change(given)
    made = trainer(kind, **options)
    new = logprobs.clone().requires_grad_()
    made._get_per_token_logps_and_entropies = lambda *a, **k: (new, entropy, None)
    loss = made._compute_loss(None, given)
    loss.backward()
    return loss.detach(), new.grad, {m: dict(v) for m, v in made._metrics.items()}


CASES = {
    **{kind: {"loss_type": kind} for kind in ("grpo", "bnpo", "dr_grpo", "dapo")},
    "kl": {"loss_type": "dapo", "beta": 0.04}, "delta": {"delta": 1.3, "loss_type": "grpo"},
    "eval": {"model": SimpleNamespace(training=False)},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_equal(name):
    for change in (lambda g: None, lambda g: g.pop("old_per_token_logps"), lambda g: g.update(tool_mask=g["completion_mask"].flip(1))):
        theirs, ours = run(GRPOTrainer, dict(CASES[name]), change), run(fused_loss(GRPOTrainer), dict(CASES[name]), change)
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-7)
        assert ours[2].keys() == theirs[2].keys()
        for mode, metrics in theirs[2].items():
            assert ours[2][mode].keys() == metrics.keys()
            for key, values in metrics.items():
                assert ours[2][mode][key] == pytest.approx(values, rel=1e-5, abs=1e-6, nan_ok=True), key


@pytest.mark.parametrize("options", [{"loss_type": "sapo"}, {"importance_sampling_level": "sequence", "loss_type": "grpo"}])
def test_the_rest_is_trls(options):
    options |= {}
    extra = {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}
    args = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=2, **extra)
    theirs = run(GRPOTrainer, dict(options) | {"args": args})
    with seam.declines() as reasons:
        ours = run(fused_loss(GRPOTrainer), dict(options) | {"args": args})
    assert len(reasons) == 1 and torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
