"""slime's hooks: what its command line takes a dotted path for, so that no file of slime's changes.

--custom-megatron-init-path fastrlhf.integrations.slime.install
--custom-advantage-function-path fastrlhf.integrations.slime.advantages
--loss-type custom_loss --custom-loss-function-path fastrlhf.integrations.slime.policy_loss

Each computes what slime's own does (`slime/backends/megatron_utils/loss.py`); what it does not cover it refuses by name, and
slime's own function, without the option, does it. Tested against the formulas of slime's sources; not run inside slime.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .hosts import semantics
from .hosts.slime import HOST
from .patching import apply, log

KL = {"k1": "k1", "k2": "k2", "k3": "k3", "low_var_kl": "k3"}
LOW_VAR_BOUND = 10.0


def install(args: Any = None) -> None:
    """Patches slime in this process and writes the report to the log."""
    log(str(apply(HOST, eager=True)))


def advantages(args: Any, rollout_data: MutableMapping[str, Any]) -> None:
    """`advantages` and `returns`, lists of (response length) tensors, from `kl` and `rewards`, all samples as one pack.

    ``ppo``: GAE of -kl_coef · kl with the reward on the last token. ``grpo``, ``gspo``, ``cispo``: the sample's reward at each
    token. ``reinforce_plus_plus``: discounted returns, the reward on the last token that counts.
    ``reinforce_plus_plus_baseline``: reward - kl_coef · kl. Whitening is slime's own, afterwards.

    Raises:
        ValueError: another estimator, context parallelism, or a response without a token.
    """
    _only_without("context parallelism", _context_parallel() > 1)
    estimator, kl = args.advantage_estimator, [k.float() for k in rollout_data["kl"]]
    lengths = [len(k) for k in kl]
    if estimator == "ppo" and 0 in lengths:
        raise ValueError(f"rollout_data: sample {lengths.index(0)} has a response without a token, which a reward needs")
    packed = torch.cat(kl)
    rewards = torch.as_tensor(rollout_data["rewards"], dtype=torch.float32, device=packed.device)
    if estimator in ("grpo", "gspo", "cispo"):
        of = torch.repeat_interleave(rewards, torch.tensor(lengths, device=packed.device))
        found, returns = of, of
    elif estimator == "reinforce_plus_plus_baseline":
        of = torch.repeat_interleave(rewards, torch.tensor(lengths, device=packed.device))
        found = returns = of - args.kl_coef * packed
    elif estimator in ("ppo", "reinforce_plus_plus"):
        cu = torch.tensor([0, *lengths], device=packed.device).cumsum(0).to(torch.int32)
        shaped = packed * -args.kl_coef
        if estimator == "ppo":
            shaped[cu[1:].long() - 1] += rewards
            values = torch.cat([v.float() for v in rollout_data["values"]])
            found, returns = ops.gae(shaped, values, gamma=args.gamma, lam=args.lambd, mask_mode="none", cu_seqlens=cu)
        else:
            shaped[_last_counted(rollout_data["loss_masks"], lengths)] += rewards
            found = returns = ops.discounted_returns(shaped, gamma=args.gamma, cu_seqlens=cu)
    else:
        raise ValueError(
            f"advantage_estimator: {estimator!r} is not one of fastrlhf's; leave --custom-advantage-function-path out"
        )
    rollout_data["advantages"], rollout_data["returns"] = list(found.split(lengths)), list(returns.split(lengths))


def policy_loss(
    args: Any, batch: Mapping[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """slime's policy loss in one pass over the logits and one over the tokens.

    Prompt rows are not computed, the temperature does not copy the logits, and loss, gradient and statistics are one launch:
    the weights of the tokens are the gradient of `sum_of_sample_mean`, which is linear.

    Args:
        logits: (1, T, V / tp), packed.

    Returns:
        (loss, the metrics slime reports).

    Raises:
        ValueError: an option that is not covered, named.
    """
    for name in ("use_opsm", "use_tis", "get_mismatch_metrics", "use_score_centering", "use_unbiased_kl"):
        _only_without(f"args.{name}", bool(getattr(args, name, False)))
    _only_without("a reducer of one's own", getattr(args, "custom_pg_loss_reducer_function_path", None) is not None)
    _only_without("rollout_top_p below 1", getattr(args, "rollout_top_p", 1.0) != 1.0)
    _only_without("context parallelism", _context_parallel() > 1)
    logprobs, entropy = _response_logprobs(args, batch, logits)
    if logprobs.numel() == 0:
        nothing = 0 * logits.sum()
        return nothing, {name: nothing.detach() for name in ("loss", "pg_loss", "entropy_loss", "pg_clipfrac", "ppo_kl")}
    lengths = [int(n) for n in batch["response_lengths"]]
    cu = torch.tensor([0, *lengths], device=logits.device).cumsum(0).to(torch.int32)
    weights = _weights(sum_of_sample_mean, logprobs)
    old = batch["rollout_log_probs"] if args.use_rollout_logprobs else batch.get("log_probs")
    old_logprobs = torch.cat(list(old)) if old else logprobs.detach()
    out = ops.policy_loss(
        logprobs, old_logprobs, torch.cat(list(batch["advantages"])), weights,
        kind=_kind(args),
        clip_low=args.eps_clip, clip_high=args.eps_clip_high, dual_clip=getattr(args, "eps_clip_c", None),
        entropy=entropy, entropy_coef=args.entropy_coef, reduction="token-sum", cu_seqlens=cu,
    )  # fmt: skip
    total = weights.sum()
    entropy_loss, loss = out.stats.get("entropy") * total, out.loss
    metrics = {
        "pg_loss": out.loss.detach() + args.entropy_coef * entropy_loss, "entropy_loss": entropy_loss,
        "pg_clipfrac": (out.stats.get("clip_fraction_low") + out.stats.get("clip_fraction_high")) * total,
        "ppo_kl": out.stats.get("approx_kl_k1") * total,
    }  # fmt: skip
    if args.use_kl_loss:
        with torch.set_grad_enabled(torch.is_grad_enabled() and float(args.kl_loss_coef) != 0):
            reference = torch.cat(list(batch["ref_log_probs"]))
            bound = LOW_VAR_BOUND if args.kl_loss_type == "low_var_kl" else None
            kl_loss = sum_of_sample_mean(ops.kl(logprobs, reference, kind=KL[args.kl_loss_type], clamp_output=bound))
        loss = loss + float(args.kl_loss_coef) * kl_loss
        metrics["kl_loss"] = kl_loss.detach()
    if distilled := batch.get("opd_reverse_kl"):
        metrics["opd_reverse_kl"] = sum_of_sample_mean(torch.cat(list(distilled))).detach()
    if rollout := batch.get("rollout_log_probs"):
        mine = logprobs.detach() if args.use_rollout_logprobs else old_logprobs
        metrics["train_rollout_logprob_abs_diff"] = sum_of_sample_mean((mine - torch.cat(list(rollout))).abs())
    return loss, {"loss": loss.detach()} | metrics


def _kind(args: Any) -> str:
    """Ours of slime's loss, which newer versions choose apart from the estimator: REINFORCE without a ratio, too."""
    choose = getattr(sys.modules.get("slime.utils.ppo_utils"), "get_pg_loss_type", None)
    chosen = choose(args) if choose is not None else args.advantage_estimator
    if chosen in ("reinforce", "cispo"):
        _only_without("CISPO of sequences", chosen == "cispo" and args.advantage_estimator == "gspo")
        return str(chosen)
    return "gspo" if args.advantage_estimator == "gspo" else "ppo"


def _response_logprobs(args: Any, batch: Mapping[str, Any], logits: Tensor) -> tuple[Tensor, Tensor]:
    """(response tokens) of all samples one after the other: log-probs, and entropy, with a gradient where it is in the loss."""
    if logits.dim() != 3 or logits.shape[0] != 1:
        raise ValueError(f"logits: expected (1, T, V), got {tuple(logits.shape)}")
    packed = logits.squeeze(0)
    labels = torch.full((len(packed),), semantics.NO_LABEL, dtype=torch.int64, device=logits.device)
    rows, end = [], 0
    for tokens, total, response in zip(
        batch["unconcat_tokens"], batch["total_lengths"], batch["response_lengths"], strict=True
    ):
        end += int(total)
        own = slice(end - int(response) - 1, end - 1)
        labels[own] = tokens[len(tokens) - int(response) :].to(labels)
        rows.append(torch.arange(own.start, own.stop, device=logits.device))
    out = ops.logprobs(
        packed, labels, temperature=getattr(args, "rollout_temperature", 1.0), entropy=True, ignore_index=semantics.NO_LABEL,
        vocab_parallel=semantics.own_shard(packed, _mpu().get_tensor_model_parallel_group()),
    )  # fmt: skip
    assert out.entropy is not None
    at = torch.cat(rows)
    entropy = out.entropy if args.entropy_coef else out.entropy.detach()
    return out.logprobs[at], entropy[at]


def _weights(linear: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    with torch.enable_grad():
        x = torch.zeros_like(like, requires_grad=True)
        (weights,) = torch.autograd.grad(linear(x), x)
    return weights


def _last_counted(masks: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    """Where in the pack each sample's last token with a mask is."""
    at, start = [], 0
    for i, (mask, length) in enumerate(zip(masks, lengths, strict=True)):
        counted = mask.nonzero()
        if not len(counted):
            raise ValueError(f"loss_masks: sample {i} has no token that counts")
        at.append(start + counted[-1, 0])
        start += length
    return torch.stack(at)


def _mpu() -> Any:
    import importlib

    return importlib.import_module("megatron.core").mpu


def _context_parallel() -> int:
    return int(_mpu().get_context_parallel_world_size())


def _only_without(what: str, given: bool) -> None:
    if given:
        raise ValueError(f"fastrlhf's hook for slime does not cover {what}: leave the hook out, slime's own function does it")
