"""torch.compile(fullgraph=True) of a function that calls each op: no graph break, same values, same gradients."""

from __future__ import annotations

import subprocess
import sys

import fastrlhf as f
import pytest
import torch
import torch._dynamo.testing

from tests.oracle import INTERPRETED

B, T, V = 3, 4 if INTERPRETED else 40, 52  # rows of logits on 16 bytes


def tensors():
    g = torch.Generator(torch.get_default_device()).manual_seed(0)

    def r(*shape):
        return torch.randn(*shape, generator=g)

    return {
        "logits": r(B, T, V), "ref_logits": r(B, T, V), "labels": torch.randint(0, V, (B, T), generator=g),
        "lp": r(B, T), "old": r(B, T), "ref": r(B, T), "values": r(B, T), "rewards": r(B, T), "mask": r(B, T) > -0.5,
        "scores": r(B), "others": r(B), "ids": torch.tensor([0, 0, 1]), "cu": torch.tensor([0, T - 1, T - 1, B * T]),
    }  # fmt: skip


def test_importing_the_operations_does_not_import_the_compiler():
    code = "import fastrlhf.ops, sys; print('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"


CALLS = {
    "logprobs": (lambda t: f.logprobs(t["logits"], t["labels"], entropy=True, lse=True, temperature=0.7, softcap=20.0), "logits"),
    "logprobs_rows": (lambda t: f.logprobs(t["logits"][:, :-1], t["labels"][:, 1:], temperature=t["lp"][:, 1:].exp(), inplace_backward=True).logprobs, "logits"),
    "kl": (lambda t: f.kl(t["lp"], t["ref"], kind="k3", clamp_output=10.0), "lp"),
    "kl_full": (lambda t: f.kl_full(t["logits"], t["ref_logits"], direction="js", mask=t["mask"]), "logits"),
    "shape_rewards": (lambda t: f.shape_rewards(t["scores"], t["lp"], t["ref"], t["mask"], kl_coef=0.1), None),
    "gae": (lambda t: f.gae(t["rewards"], t["values"], t["mask"], whiten=True, lam=t["scores"].sigmoid()), None),
    "gae_packed": (lambda t: f.gae(t["rewards"].reshape(-1), t["values"].reshape(-1), cu_seqlens=t["cu"]), None),
    "discounted_returns": (lambda t: f.discounted_returns(t["rewards"], t["mask"], gamma=0.9), None),
    "experience": (lambda t: f.experience(t["scores"], t["lp"], t["ref"], t["values"], t["mask"], kl_coef=0.1, whiten=True), None),
    "group_advantages": (lambda t: f.group_advantages(t["scores"], t["ids"], kind="reinforce++"), None),
    "masked_mean": (lambda t: (f.masked_mean(t["lp"], t["mask"]), f.masked_mean(t["lp"], t["mask"], 0)), "lp"),
    "masked_var": (lambda t: f.masked_var(t["lp"], t["mask"]), "lp"),
    "whiten": (lambda t: f.whiten(t["lp"], t["mask"]), "lp"),
    "policy_loss": (lambda t: f.policy_loss(t["lp"], t["old"], t["rewards"], t["mask"], ref_logprobs=t["ref"], kl_coef=0.1), "lp"),
    "policy_loss_gspo": (lambda t: f.policy_loss(t["lp"], t["old"], t["scores"], t["mask"], kind="gspo", reduction="seq-mean-token-mean"), "lp"),
    "logits_policy_loss": (lambda t: f.logits_policy_loss(t["logits"], t["labels"], t["old"], t["rewards"], t["mask"])[0], "logits"),
    "value_loss": (lambda t: f.value_loss(t["lp"], t["values"], t["rewards"], t["mask"]), "lp"),
    "preference_loss": (lambda t: f.preference_loss(t["scores"], t["others"], t["others"] * 0, t["others"] * 0, kind="ipo"), "scores"),
    "reward_loss": (lambda t: f.reward_loss(t["scores"], t["others"]), "scores"),
    "regression_loss": (lambda t: f.regression_loss(t["lp"], t["ref"]), "lp"),
    "topk_distill_loss": (lambda t: f.topk_distill_loss(t["logits"], *t["ref_logits"].topk(5), t["mask"], direction="reverse"), "logits"),
    "steerlm2_loss": (lambda t: f.steerlm2_loss(t["lp"], t["old"], t["ref"], t["values"], t["mask"]), "lp"),
    "sequence_logprobs": (lambda t: f.sequence_logprobs(t["lp"], t["mask"], average=True), "lp"),
    "sequence_logprobs_packed": (lambda t: f.sequence_logprobs(t["lp"].reshape(-1), cu_seqlens=t["cu"]), "lp"),
    "sample": (lambda t: f.sample(t["logits"], seed=3, top_p=0.9, kept=True), None),
}  # fmt: skip


def leaves(out):
    if isinstance(out, torch.Tensor):
        return [out]
    if isinstance(out, (tuple, list)):
        return [leaf for x in out for leaf in leaves(x)]
    return []


@pytest.mark.parametrize("name", CALLS)
def test_fullgraph(name):
    call, variable = CALLS[name]
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: call(t), fullgraph=True, backend="aot_eager")
    results = []
    for function in (call, compiled):
        t = tensors()
        if variable:
            t[variable].requires_grad_()
        out = leaves(function(t))
        if variable:
            torch.stack([x.float().sum() for x in out if x.requires_grad]).sum().backward()
        results.append((out, t[variable].grad if variable else None))
    (a, ga), (b, gb) = results
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)
    if variable:
        torch.testing.assert_close(ga, gb)


def test_inductor_and_changing_shapes():
    """The default backend, and other lengths without another compilation."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")

    def step(logits, labels, old, advantages):
        lp = f.logprobs(logits * 1.5, labels)
        return f.policy_loss(lp.logprobs, old, advantages, None).loss * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for length in (16, 23, 31):
        args = torch.randn(2, length, V), torch.randint(0, V, (2, length)), torch.randn(2, length), torch.randn(2)
        x, y = args[0].clone().requires_grad_(), args[0].clone().requires_grad_()
        a, b = step(x, *args[1:]), compiled(y, *args[1:])
        a.backward(), b.backward()
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(x.grad, y.grad)
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1]  # no length after the first compiles again


@pytest.mark.parametrize("name", ["logprobs", "kl", "policy_loss", "value_loss", "row_sums", "masked_var", "kl_full"])
def test_registrations(compiled, name):
    """torch's own check of schema, fake and autograd registration."""
    t = tensors()
    grad = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in t.items()}
    arguments = {
        "logprobs": (grad["logits"], t["labels"], None, None, None, None, 1.0, 0.0, -100, 0, V, True, True, True, False),
        "kl": (grad["lp"], grad["ref"], 3, 20.0, 10.0, False),
        "kl_full": (grad["logits"], grad["ref_logits"], t["mask"], 0, 1.0, True),
        "policy_loss": (grad["lp"], t["old"].detach(), t["rewards"].detach(), t["mask"], None, None, None, None, None,
                        [0.2, 0.2, 3.0, 20.0, 9.0, 1.0, 1.05, 0.0, 0.0, 0.0, 0.0], 7.0, [0, 0, 0, 3, 0], True, False),
        "value_loss": (grad["values"], t["old"].detach(), t["rewards"].detach(), t["mask"], None, None, 0.2, 0, 5.0, True),
        "row_sums": (grad["lp"], t["mask"], True, None, True),
        "masked_var": (grad["lp"].reshape(-1), t["mask"].reshape(-1), True),
    }[name]  # fmt: skip
    op = getattr(torch.ops.fastrlhf, name).default
    torch.library.opcheck(
        op, (*arguments, compiled), test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )
