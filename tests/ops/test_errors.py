"""Wrong inputs: the exception names the argument and what came, and inputs are untouched."""

from __future__ import annotations

import re

import fastrlhf as f
import pytest
import torch
from fastrlhf.ops import backend as backends

NAN = float("nan")
x23, m23 = torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool)
logits, labels = torch.randn(2, 5), torch.tensor([0, 4])
half_meta = torch.empty(2, 3, device="meta")
cu = torch.tensor([0, 2, 6])
six = torch.randn(6)
h23, w54, y23 = torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4), torch.zeros(2, 3, dtype=torch.long)
t35, t32, i32 = torch.randn(3, 5), torch.randn(3, 2), torch.tensor([[0, 1]] * 3)

CASES = [
    # op, arguments, options, error, what the message must hold
    (f.logprobs, (logits, torch.tensor([0, 5])), {}, IndexError, "labels: 5 at flat position 1"),
    (f.logprobs, (logits, torch.tensor([-1, 0])), {}, IndexError, "labels: -1 at flat position 0"),
    (f.logprobs, (logits, torch.tensor([0])), {}, ValueError, "labels: expected shape (2,)"),
    (f.logprobs, (logits, torch.tensor([0.0, 1.0])), {}, TypeError, "labels"),
    (f.logprobs, (logits.long(), labels), {}, TypeError, "logits"),
    (f.logprobs, ([1.0], labels), {}, TypeError, "logits: expected a torch.Tensor, got list"),
    (f.logprobs, (torch.randn(5, 2).t(), labels), {}, ValueError, "logits: expected last stride 1"),
    (f.logprobs, (logits, labels.to("meta")), {}, ValueError, f"labels: expected on logits's device '{logits.device}', got 'meta'"),
    (f.logprobs, (logits, labels), {"temperature": 0.0}, ValueError, "temperature: expected a finite number in (0"),
    (f.logprobs, (logits, labels), {"temperature": -1.0}, ValueError, "got -1.0"),
    (f.logprobs, (logits, labels), {"temperature": NAN}, ValueError, "temperature"),
    (f.logprobs, (logits, labels), {"temperature": "1"}, TypeError, "temperature: expected a number, got str"),
    (f.logprobs, (logits, labels), {"temperature": torch.tensor([1.0, 0.0])}, ValueError, "temperature: every value"),
    (f.logprobs, (logits, labels), {"temperature": torch.ones(3)}, ValueError, "temperature: expected shape (2,)"),
    (f.logprobs, (logits, labels), {"softcap": 0.0}, ValueError, "softcap"),
    (f.logprobs, (logits, labels), {"kept": torch.ones(2, 4, dtype=torch.bool)}, ValueError, "kept: expected shape (2, 5), got (2, 4)"),
    (f.logprobs, (logits, labels), {"kept": (torch.tensor([0, 1]), torch.tensor([0]))}, ValueError, "kept indptr: expected 3 entries"),
    pytest.param(f.logprobs, (logits, labels), {"backend": "cuda"}, ValueError, "cuda: not part of this build", marks=pytest.mark.cpu_only),
    (f.logprobs, (logits, labels), {"backend": "gpu"}, ValueError, "backend: must be one of"),
    (f.logprobs, (logits.to("meta"), labels.to("meta")), {"backend": "cpu"}, ValueError, "needs CPU tensors"),
    (f.logprobs, (logits.to("meta"), labels.to("meta")), {}, ValueError, "no kernels for device 'meta'"),
    (f.logprobs, (torch.randn(1, 5).expand(2, 5), labels), {"inplace_backward": True}, ValueError, "share memory"),
    (f.kl, (x23, torch.randn(2, 4)), {}, ValueError, "ref_logprobs: expected the shape of logprobs, (2, 3), got (2, 4)"),
    (f.kl, (x23, x23), {"kind": "k4"}, ValueError, "kind: expected one of"),
    (f.kl, (x23, x23), {"clamp_input": -1.0}, ValueError, "clamp_input"),
    (f.kl_full, (logits, logits.double()), {}, TypeError, "ref_logits"),
    (f.kl_full, (logits, logits), {"direction": "up"}, ValueError, "direction"),
    (f.kl_full, (logits, logits), {"temperature": 0}, ValueError, "temperature"),
    (f.kl_full, (logits, logits), {"mask": torch.ones(3)}, ValueError, "mask: expected shape (2,)"),
    (f.gae, (x23, x23), {"lam": NAN}, ValueError, "lam: expected a finite number in [0, 1], got nan"),
    (f.gae, (x23, x23), {"lam": torch.tensor([0.5, NAN])}, ValueError, "lam"),
    (f.gae, (x23, x23), {"lam": torch.ones(3)}, ValueError, "lam: expected shape (2,)"),
    (f.gae, (x23, x23), {"gamma": 1.5}, ValueError, "gamma: expected a finite number in [0, 1], got 1.5"),
    (f.gae, (x23, torch.randn(3, 2)), {}, ValueError, "values: expected the shape of rewards"),
    (f.gae, (x23, x23, torch.ones(2, 2)), {}, ValueError, "mask"),
    (f.gae, (x23, x23), {"mask_mode": "skip"}, ValueError, "mask_mode"),
    (f.gae, (x23, x23), {"bootstrap": torch.ones(3)}, ValueError, "bootstrap: expected shape (2,)"),
    (f.gae, (x23, x23), {"cu_seqlens": cu}, ValueError, "rewards: expected packed"),
    (f.gae, (six, six), {"cu_seqlens": torch.tensor([0, 4, 2, 6])}, ValueError, "cu_seqlens: must"),
    (f.gae, (six, six), {"cu_seqlens": torch.tensor([1, 6])}, ValueError, "cu_seqlens: must begin with 0"),
    (f.gae, (six, six), {"cu_seqlens": torch.tensor([0, 5])}, ValueError, "cu_seqlens"),
    (f.gae, (six, six), {"cu_seqlens": torch.tensor([0.0, 6.0])}, TypeError, "cu_seqlens"),
    (f.gae, (half_meta, half_meta), {}, ValueError, "device 'meta'"),
    (f.discounted_returns, (x23,), {"gamma": NAN}, ValueError, "gamma"),
    (f.shape_rewards, (torch.ones(3), x23, x23, m23), {"kl_coef": 0.1}, ValueError, "scores: expected shape (2,)"),
    (f.shape_rewards, (torch.ones(2), x23, x23, m23), {"kl_coef": NAN}, ValueError, "kl_coef"),
    (f.experience, (torch.ones(2), x23, x23, torch.ones(2), m23), {"kl_coef": 0.1}, ValueError, "values"),
    (f.group_advantages, (torch.ones(4), torch.zeros(3, dtype=torch.long)), {}, ValueError, "group_ids: expected shape (4,)"),
    (f.group_advantages, (torch.ones(4), torch.zeros(4)), {}, TypeError, "group_ids"),
    (f.group_advantages, (torch.ones(2, 2), torch.zeros(4, dtype=torch.long)), {}, ValueError, "scores: expected shape (B,)"),
    (f.group_advantages, (torch.ones(1), torch.zeros(1, dtype=torch.long)), {"kind": "opo"}, ValueError, "lengths: needed"),
    (f.masked_mean, (x23, m23[:1]), {}, ValueError, "mask: expected the shape of x"),
    (f.masked_mean, (x23, m23, 2), {}, IndexError, "dim"),
    (f.masked_var, (m23, m23), {}, TypeError, "x: expected one of"),
    (f.whiten, (x23, m23), {"eps": -1.0}, ValueError, "eps"),
    (f.policy_loss, (x23, x23[:1], x23, m23), {}, ValueError, "old_logprobs: expected the shape of logprobs"),
    (f.policy_loss, (x23, x23, torch.ones(3), m23), {}, ValueError, "advantages: expected the shape of logprobs, (2, 3), or (2,), got (3)"),
    (f.policy_loss, (x23, x23, x23, m23.to("meta")), {}, ValueError, "mask: expected on"),
    (f.policy_loss, (x23, x23, x23, m23), {"kind": "pg"}, ValueError, "kind"),
    (f.policy_loss, (x23, x23, x23, m23), {"reduction": "mean"}, ValueError, "reduction"),
    (f.policy_loss, (x23, x23, x23, m23), {"clip_low": -0.1}, ValueError, "clip_low"),
    (f.policy_loss, (x23, x23, x23, m23), {"dual_clip": 1.0}, ValueError, "dual_clip"),
    (f.policy_loss, (x23, x23, x23, m23), {"kl_coef": 0.1}, ValueError, "ref_logprobs: needed for kl_coef=0.1"),
    (f.policy_loss, (x23, x23, x23, m23), {"entropy_coef": 0.1}, ValueError, "entropy: needed"),
    (f.policy_loss, (x23, x23, x23, m23), {"rollout_correction": "tis"}, ValueError, "rollout_logprobs: needed"),
    (f.policy_loss, (x23, x23, x23, m23), {"rollout_correction": "is"}, ValueError, "rollout_correction: kind"),
    (f.policy_loss, (x23, x23, x23, m23), {"denominator": -1.0}, ValueError, "denominator"),
    (f.policy_loss, (x23, x23, x23, m23), {"denominator": torch.ones(2)}, ValueError, "denominator: expected one number"),
    (f.linear_policy_loss, (h23, w54, y23, x23[:1], x23, m23), {}, ValueError, "old_logprobs: expected the shape of logprobs, (2, 3), got (1, 3)"),
    (f.linear_policy_loss, (h23, w54, y23, None, x23, m23), {}, TypeError, "old_logprobs: expected a torch.Tensor, got NoneType"),
    (f.linear_policy_loss, (h23, w54, y23, x23, torch.ones(3), m23), {}, ValueError, "advantages: expected the shape of logprobs, (2, 3), or (2,), got (3)"),
    (f.linear_policy_loss, (h23, w54, y23, x23, x23, m23[:, :1]), {}, ValueError, "mask: expected the shape of logprobs, (2, 3), got (2, 1)"),
    (f.linear_policy_loss, (h23, w54, y23, x23, x23, [1]), {}, TypeError, "mask: expected a torch.Tensor, got list"),
    (f.linear_policy_loss, (h23, w54, y23, x23, x23, m23), {"ref_logprobs": x23[:, :2]}, ValueError, "ref_logprobs: expected the shape"),
    (f.linear_policy_loss, (h23, w54, y23, x23, x23, m23), {"kl_coef": 0.1}, ValueError, "ref_logprobs: needed for kl_coef=0.1"),
    (f.linear_policy_loss, (h23, w54, y23, x23, x23, m23), {"clip_low": -1.0}, ValueError, "clip_low"),
    (f.linear_policy_loss, (h23, w54, y23, x23, x23, m23), {"denominator": -1.0}, ValueError, "denominator"),
    (f.value_loss, (x23, None, x23, m23), {}, ValueError, "old_values: needed for clip=0.2"),
    (f.value_loss, (x23, x23, x23, m23), {"clip": 0.0}, ValueError, "clip"),
    (f.preference_loss, (six, six[:3], six, six), {"kind": "dpo"}, ValueError, "rejected: expected the shape of chosen, (6), got (3)"),
    (f.preference_loss, (six, six, None, None), {"kind": "dpo"}, ValueError, "ref_chosen: kind 'dpo' needs"),
    (f.preference_loss, (six, six, six, six), {"kind": "simpo"}, ValueError, "has no reference"),
    (f.preference_loss, (six, six, six, six), {"kind": "rpo_sq"}, ValueError, "chosen_rewards"),
    (f.preference_loss, (six, six, six, six), {"kind": "dpo", "beta": 0.0}, ValueError, "beta"),
    (f.preference_loss, (six, six, six, six), {"kind": "robust", "label_smoothing": 0.5}, ValueError, "label_smoothing"),
    (f.reward_loss, (six, six), {"denominator": torch.ones(3)}, ValueError, "denominator: expected one number, got shape (3)"),
    (f.reward_loss, (six, six), {"kind": "margin_bt"}, ValueError, "margin: kind 'margin_bt' needs one"),
    (f.reward_loss, (six, six, six), {}, ValueError, "margin: kind 'bt' has none"),
    (f.regression_loss, (x23, six), {}, ValueError, "targets"),
    (f.topk_distill_loss, (t35, x23, y23), {}, ValueError, "teacher_logits: expected shape (3, K), got (2, 3)"),
    (f.topk_distill_loss, (t35, t32, y23), {}, ValueError, "teacher_ids: expected the shape of teacher_logits, (3, 2), got (2, 3)"),
    (f.topk_distill_loss, (t35, t32, i32 + 4), {}, IndexError, "teacher_ids: 5 at flat position 1 is outside [0, 5)"),
    (f.topk_distill_loss, (t35, t32, i32.float()), {}, TypeError, "teacher_ids: expected one of"),
    (f.topk_distill_loss, (t35, t32, None), {}, ValueError, "logits: expected shape (3, 2) without teacher_ids, got (3, 5)"),
    (f.topk_distill_loss, (t35, t32, i32, t32), {}, ValueError, "mask: expected shape (3,), got (3, 2)"),
    (f.topk_distill_loss, (t35, t32, i32), {"direction": "js"}, ValueError, "direction: expected one of"),
    (f.topk_distill_loss, (t35, t32, i32), {"temperature": 0.0}, ValueError, "temperature"),
    (f.topk_distill_loss, (t35, t32, i32), {"teacher_temperature": -1.0}, ValueError, "teacher_temperature: expected a finite number in (0"),
    (f.topk_distill_loss, (t35, t32, i32), {"denominator": 0.0}, ValueError, "denominator"),
    pytest.param(f.topk_distill_loss, (t35, t32, i32), {"denominator": torch.tensor(-1.0)}, ValueError, "denominator: expected a finite number >= 0, got -1.0", marks=pytest.mark.cpu_only),
    (f.steerlm2_loss, (x23, x23, x23, x23), {"denominator": torch.ones(3)}, ValueError, "denominator: expected one number, got shape (3)"),
    (f.steerlm2_loss, (six, six, six, six), {}, ValueError, "logprobs: expected shape (P, n)"),
    (f.steerlm2_loss, (x23, x23, six, x23), {}, ValueError, "attribute_logprobs: expected the shape of logprobs, (2, 3), got (6)"),
    (f.steerlm2_loss, (x23, x23, x23, x23, six), {}, ValueError, "mask: expected the shape"),
    (f.sequence_logprobs, (six,), {"cu_seqlens": torch.tensor([0, 7])}, ValueError, "cu_seqlens"),
    (f.sample, (logits,), {"temperature": -0.5}, ValueError, "temperature"),
    (f.sample, (logits,), {"top_p": 0.0}, ValueError, "top_p"),
    (f.sample, (logits,), {"top_p": torch.tensor([0.5, 1.5])}, ValueError, "top_p: 1.5 at flat position 1"),
    (f.sample, (logits,), {"top_k": 1.5}, TypeError, "top_k"),
    (f.sample, (logits,), {"seed": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "seed: expected on"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _values_are_checked(monkeypatch):
    """On a GPU too."""
    monkeypatch.setattr(backends, "CHECK", True)


@pytest.mark.parametrize(("op", "arguments", "options", "error", "message"), CASES, ids=lambda v: getattr(v, "__name__", None))
def test_wrong_inputs(op, arguments, options, error, message):
    tensors = [t for t in (*arguments, *options.values()) if isinstance(t, torch.Tensor) and t.device.type == "cpu"]
    before = [t.clone() for t in tensors]
    with pytest.raises(error, match=re.escape(message)):
        op(*arguments, **options)
    assert all(
        torch.equal(
            a,
            b,
        )
        or (a != a).any()
        for a, b in zip(tensors, before, strict=True)
    )


@pytest.mark.cpu_only  # elsewhere labels are checked as they come in
def test_a_failed_backward_leaves_the_logits():
    """Labels changed under the op's feet: nothing is written, in place or not."""
    x = torch.randn(2, 5).requires_grad_()
    y = torch.tensor([0, 1])
    z = x * 1
    out = f.logprobs(z, y, inplace_backward=True).logprobs.sum()
    kept = z.detach().clone()
    y.data[1] = 9
    with pytest.raises(IndexError, match="labels: 9"):
        out.backward()
    assert torch.equal(z.detach(), kept)


def test_torchs_defaults_do_not_reach_the_kernels():
    """A changed default dtype or device once made the kernels write past their outputs."""
    lp = torch.randn(4, 50)
    expected = f.policy_loss(lp, lp, lp, None), f.sample(lp, seed=0), f.gae(lp, lp)
    try:
        for dtype in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(dtype)
            loss, s, a = f.policy_loss(lp, lp, lp, None), f.sample(lp, seed=0), f.gae(lp, lp)
            assert torch.equal(loss.stats.values, expected[0].stats.values) and torch.equal(s.logprobs, expected[1].logprobs)
            assert torch.equal(a[0], expected[2][0])
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        loss = f.policy_loss(lp, lp, lp, None)
        assert loss.loss.device == lp.device and torch.equal(loss.stats.values, expected[0].stats.values)
