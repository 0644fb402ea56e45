"""slime's hooks against slime's formulas in plain PyTorch; Megatron's process groups are a stand-in of one process."""

from __future__ import annotations

import sys
import types
from argparse import Namespace

import pytest
import torch
from fastrlhf import integrations
from fastrlhf.integrations import slime
from fastrlhf.integrations.hosts.nemo_rl import alone
from fastrlhf.integrations.hosts.slime import HOST

from . import contracts

VOCAB = 61
TOTAL, RESPONSE = [7, 5, 9], [4, 2, 6]


@pytest.fixture(autouse=True)
def megatron(monkeypatch):
    mpu = types.SimpleNamespace(get_tensor_model_parallel_group=alone, get_context_parallel_world_size=lambda: 1)
    core = types.ModuleType("megatron.core")
    core.mpu = mpu
    monkeypatch.setitem(sys.modules, "megatron", types.ModuleType("megatron"))
    monkeypatch.setitem(sys.modules, "megatron.core", core)
    return mpu


def options(**given) -> Namespace:
    usual = {
        "advantage_estimator": "ppo", "kl_coef": 0.1, "gamma": 0.97, "lambd": 0.9, "rollout_temperature": 0.7, "rollout_top_p": 1.0,
        "entropy_coef": 0.01, "eps_clip": 0.1, "eps_clip_high": 0.2, "eps_clip_c": None, "use_kl_loss": False,
        "kl_loss_coef": 0.2, "kl_loss_type": "low_var_kl", "use_rollout_logprobs": False,
    }  # fmt: skip
    return Namespace(**usual | given)


def masks() -> list[torch.Tensor]:
    out = [torch.ones(n) for n in RESPONSE]
    out[0][1] = 0
    out[2][-1] = 0
    return out


def sum_of_sample_mean(x: torch.Tensor) -> torch.Tensor:
    return sum((part * m).sum() / m.sum() for part, m in zip(x.split(RESPONSE), masks(), strict=True))


def rollout() -> dict:
    torch.manual_seed(0)
    return {
        "kl": [torch.randn(n) for n in RESPONSE], "rewards": [1.0, -0.5, 2.0], "values": [torch.randn(n) for n in RESPONSE],
        "loss_masks": masks(), "response_lengths": RESPONSE, "total_lengths": TOTAL,
    }  # fmt: skip


def defined_advantages(args: Namespace, data: dict) -> tuple[list, list]:
    found, returns = [], []
    for kl, reward, values, mask in zip(data["kl"], data["rewards"], data["values"], data["loss_masks"], strict=True):
        r, last = -args.kl_coef * kl, len(kl) - 1
        if args.advantage_estimator == "ppo":
            r[last] += reward
            a, running, following = torch.zeros_like(r), 0.0, 0.0
            for t in range(last, -1, -1):
                running = r[t] + args.gamma * following - values[t] + args.gamma * args.lambd * running
                a[t], following = running, values[t]
            found.append(a)
            returns.append(a + values)
        elif args.advantage_estimator == "reinforce_plus_plus":
            r[int(mask.nonzero()[-1])] += reward
            g, running = torch.zeros_like(r), 0.0
            for t in range(last, -1, -1):
                running = r[t] + args.gamma * running
                g[t] = running
            found.append(g)
            returns.append(g)
        else:
            found.append(reward + (r if args.advantage_estimator.endswith("baseline") else 0 * r))
            returns.append(found[-1])
    return found, returns


@pytest.mark.parametrize("estimator", ["ppo", "grpo", "gspo", "cispo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"])
def test_advantages(estimator):
    args, data = options(advantage_estimator=estimator), rollout()
    expected = defined_advantages(args, rollout())
    slime.advantages(args, data)
    for name, lists in zip(("advantages", "returns"), expected, strict=True):
        for ours, theirs in zip(data[name], lists, strict=True):
            torch.testing.assert_close(ours, theirs)


def batch() -> dict:
    torch.manual_seed(1)
    tokens = [torch.randint(0, VOCAB, (n,)) for n in TOTAL]
    return {
        "unconcat_tokens": tokens, "total_lengths": TOTAL, "response_lengths": RESPONSE, "loss_masks": masks(),
        "advantages": [torch.randn(n) for n in RESPONSE], "log_probs": [-4 + torch.randn(n) for n in RESPONSE],
        "ref_log_probs": [-4 + 3 * torch.randn(n) for n in RESPONSE], "rollout_log_probs": [-4 + torch.randn(n) for n in RESPONSE],
    }  # fmt: skip


def defined_loss(args: Namespace, given: dict, logits: torch.Tensor) -> tuple[torch.Tensor, dict]:
    rows = (logits[0] / args.rollout_temperature).log_softmax(-1)
    logprobs, entropy, end = [], [], 0
    for tokens, total, n in zip(given["unconcat_tokens"], TOTAL, RESPONSE, strict=True):
        end += total
        own = rows[end - n - 1 : end - 1]
        logprobs.append(own.gather(-1, tokens[-n:, None])[:, 0])
        entropy.append(-(own.exp() * own).sum(-1))
    old = given["rollout_log_probs"] if args.use_rollout_logprobs else given["log_probs"]
    ppo_kl = [o - x for o, x in zip(old, logprobs, strict=True)]
    if args.advantage_estimator == "gspo":
        ppo_kl = [((k * m).sum() / m.sum()).expand_as(k) for k, m in zip(ppo_kl, masks(), strict=True)]
    ppo_kl, x, a = torch.cat(ppo_kl), torch.cat(logprobs), torch.cat(given["advantages"])
    ratio = (-ppo_kl).exp()
    clipped = ratio.clamp(1 - args.eps_clip, 1 + args.eps_clip_high)
    if args.advantage_estimator == "cispo":
        loss, fraction = -clipped.detach() * a * x, None
    else:
        loss, fraction = torch.maximum(-ratio * a, -clipped * a), (-clipped * a > -ratio * a).float()
        if args.eps_clip_c is not None:
            loss = torch.where(a < 0, torch.minimum(-args.eps_clip_c * a, loss), loss)
    metrics = {"pg_loss": sum_of_sample_mean(loss), "ppo_kl": sum_of_sample_mean(ppo_kl)}
    if fraction is not None:
        metrics["pg_clipfrac"] = sum_of_sample_mean(fraction)
    metrics["entropy_loss"] = sum_of_sample_mean(torch.cat(entropy))
    total = metrics["pg_loss"] - args.entropy_coef * metrics["entropy_loss"]
    if args.use_kl_loss:
        d = torch.cat(given["ref_log_probs"]) - x
        kl = d.exp() - 1 - d
        metrics["kl_loss"] = sum_of_sample_mean(kl.clamp(-10, 10) if args.kl_loss_type == "low_var_kl" else kl)
        total = total + args.kl_loss_coef * metrics["kl_loss"]
    mine = x if args.use_rollout_logprobs else torch.cat(old)
    metrics["train_rollout_logprob_abs_diff"] = sum_of_sample_mean((mine - torch.cat(given["rollout_log_probs"])).abs())
    return total, metrics | {"loss": total}


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"eps_clip_c": 3.0, "entropy_coef": 0.0},
        {"use_rollout_logprobs": True, "rollout_temperature": 1.0},
        {"use_kl_loss": True},
        {"use_kl_loss": True, "kl_loss_type": "k3"},
        {"use_kl_loss": True, "kl_loss_coef": 0.0},
        {"advantage_estimator": "gspo"},
        {"advantage_estimator": "cispo"},
    ],
    ids=str,
)
def test_policy_loss(given):
    args, data = options(**given), batch()
    logits = torch.randn(1, sum(TOTAL) + 3, VOCAB) * 2  # three rows of padding
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, metrics = slime.policy_loss(args, data, a, sum_of_sample_mean)
    expected, defined = defined_loss(args, data, b)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    for name, value in defined.items():
        torch.testing.assert_close(metrics[name], value.detach(), rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_a_loss_that_is_chosen_apart_from_the_estimator(monkeypatch):
    """Newer versions run REINFORCE on any advantages."""
    chooses = types.SimpleNamespace(get_pg_loss_type=lambda args: "reinforce")
    monkeypatch.setitem(sys.modules, "slime.utils.ppo_utils", chooses)
    args, data = options(entropy_coef=0.0), batch()
    logits = torch.randn(1, sum(TOTAL), VOCAB)
    loss, metrics = slime.policy_loss(args, data, logits, sum_of_sample_mean)
    monkeypatch.delitem(sys.modules, "slime.utils.ppo_utils")
    rows, end, own = (logits[0] / args.rollout_temperature).log_softmax(-1), 0, []
    for tokens, total, n in zip(data["unconcat_tokens"], TOTAL, RESPONSE, strict=True):
        end += total
        own.append(rows[end - n - 1 : end - 1].gather(-1, tokens[-n:, None])[:, 0])
    torch.testing.assert_close(loss, sum_of_sample_mean(-torch.cat(data["advantages"]) * torch.cat(own)))
    assert float(metrics["pg_clipfrac"]) == 0


def test_a_response_without_a_token_is_refused():
    """Its reward would go to the sample before it."""
    data = rollout()
    data["kl"][1] = data["kl"][1][:0]
    with pytest.raises(ValueError, match="sample 1 has a response without a token"):
        slime.advantages(options(), data)


def test_the_first_step_is_on_policy():
    args, data = options(), batch()
    del data["log_probs"]
    logits = torch.randn(1, sum(TOTAL), VOCAB)
    _, metrics = slime.policy_loss(args, data, logits, sum_of_sample_mean)
    assert float(metrics["ppo_kl"]) == 0 and float(metrics["pg_clipfrac"]) == 0


@pytest.mark.parametrize("name", ["use_opsm", "use_tis", "use_score_centering", "use_unbiased_kl"])
def test_what_is_not_covered_is_refused(name):
    with pytest.raises(ValueError, match=f"does not cover args.{name}"):
        slime.policy_loss(options(**{name: True}), batch(), torch.randn(1, sum(TOTAL), VOCAB), sum_of_sample_mean)


def test_installation_makes_the_seams_live(monkeypatch, caplog):
    for name, module in contracts.modules("slime").items():
        monkeypatch.setitem(sys.modules, name, module)
    with caplog.at_level("INFO", "fastrlhf"):
        slime.install(options())
    assert f"{len(HOST.seams)} seams live" in caplog.text and ", 0 not live" in caplog.text
    integrations.unpatch("slime")


def test_context_parallelism_is_refused(megatron):
    megatron.get_context_parallel_world_size = lambda: 2
    with pytest.raises(ValueError, match="context parallelism"):
        slime.advantages(options(), rollout())
    with pytest.raises(ValueError, match="'opo' is not one of"):
        megatron.get_context_parallel_world_size = lambda: 1
        slime.advantages(options(advantage_estimator="opo"), rollout())
