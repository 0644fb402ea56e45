"""verl's value loss, and our policy losses and advantages under names of their own in verl's registries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ..seam import Call, Entry, Sizes, decline, in_place_of
from . import semantics
from .inputs import inputs

ALGORITHMS = "verl.trainer.ppo.core_algos"
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")


def check_counts(mode: str, dp_size: float, tokens: Any, sequences: Any) -> None:
    """As verl's agg_loss does."""
    if mode not in MODES:
        raise ValueError(f"Invalid loss_agg_mode: {mode}")
    if dp_size > 1 and mode == "token-mean" and tokens is None:
        raise ValueError("(global) batch_num_tokens is required when dp_size > 1")
    if dp_size > 1 and mode.startswith("seq") and sequences is None:
        raise ValueError("global_batch_size is required when dp_size > 1")


def aggregated(loss: Tensor, mode: str, width: int, dp_size: float, sequences: Any, scale: Any) -> Tensor:
    """What a divisor cannot say: a sum over ranks, and a norm of its own over the local count."""
    if mode == "token-sum" and dp_size != 1:
        return loss * dp_size
    if mode == "seq-mean-token-sum-norm" and sequences is None and scale is not None:
        return loss * (width / scale)
    return loss


def value_loss(original: Any) -> Any:
    @in_place_of(original)
    def replacement(
        vpreds: Tensor, returns: Tensor, values: Tensor, response_mask: Tensor, cliprange_value: float,
        loss_agg_mode: str = "token-mean", dp_size: int = 1, batch_num_tokens: Any = None, global_batch_size: Any = None,
        loss_scale_factor: Any = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        reason = semantics.statistics_obstacle(vpreds, response_mask)
        if reason is None and not (returns.dtype == values.dtype == torch.float32 and isinstance(cliprange_value, float)):
            reason = "returns or values that are not float32, or a clip range that is no number"
        if reason is None and any(t.requires_grad and torch.is_grad_enabled() for t in (returns, values)):
            reason = "returns or values with a gradient"
        if reason is not None:
            decline("verl compute_value_loss", reason)
            counts = {
                "dp_size": dp_size, "batch_num_tokens": batch_num_tokens, "global_batch_size": global_batch_size,
                "loss_scale_factor": loss_scale_factor,
            }  # fmt: skip
            given = {k: v for k, v in counts.items() if v is not None and (k, v) != ("dp_size", 1)}  # 0.7 and 0.8 have none
            return original(vpreds, returns, values, response_mask, cliprange_value, loss_agg_mode, **given)
        check_counts(loss_agg_mode, dp_size, batch_num_tokens, global_batch_size)
        width = response_mask.shape[-1]
        over = semantics.denominator(loss_agg_mode, width, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
        loss, stats = ops.value_loss(
            vpreds, values, returns, response_mask, clip=cliprange_value, reduction=loss_agg_mode, denominator=over
        )
        loss = aggregated(loss, loss_agg_mode, width, dp_size, global_batch_size, loss_scale_factor)
        return loss, stats.get("clip_fraction")

    return replacement


def counts() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "local counts", {}
    yield "global counts", {"dp_size": 2, "batch_num_tokens": 57, "global_batch_size": 9, "loss_scale_factor": 40}
    yield "a scale of its own", {"loss_scale_factor": 11}


def value_loss_calls(sizes: Sizes) -> Iterator[Call]:
    make = inputs(sizes)
    v, r, old = make.batch(), make.batch(), make.batch()
    for mode in MODES:
        for name, options in counts():
            for dtype in (torch.float32, torch.int64) if mode == "token-mean" else (torch.float32,):
                m = make.mask(dtype)
                if len(m) > 2:
                    m[1] = 0
                lacks = ValueError if mode == "token-sum" else None  # 0.7, 0.8
                options = {"loss_agg_mode": mode, **options}
                yield Call(f"{mode}, {name}, {dtype} mask", (v, r, old, m, 0.2), options, grads=(0,), lacks=lacks)
    m = make.mask()
    yield Call("no global count over two ranks", (v, r, old, m, 0.2), {"dp_size": 2}, raises=ValueError)
    if sizes.dtype == torch.float32:
        yield Call("all masked", (v, r, old, torch.zeros_like(m), 0.2), differs="0 / 0 is NaN in the host's mean")


# --- policy losses -----------------------------------------------------------------------------------------------------------


def policy_loss(kind: str) -> Callable[[Any], Any]:
    """A policy loss of verl's signature: its clip ranges, log-ratio clamp, dual clip and reductions from its config."""

    def build(module: Any) -> Any:
        def loss(
            old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
            loss_agg_mode: str = "token-mean", config: Any = None, rollout_is_weights: Tensor | None = None,
        ) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
            if config is None:
                raise ValueError("config: verl's actor config is needed, got None")
            info = dict(config.global_batch_info)
            mode = "seq-mean-token-mean" if kind == "sapo" else loss_agg_mode
            dp_size, tokens = info.get("dp_size", 1), info.get("batch_num_tokens")
            sequences, scale = info.get("global_batch_size"), info.get("loss_scale_factor")
            check_counts(mode, dp_size, tokens, sequences)
            if rollout_is_weights is not None:  # they are not negative, and every kind is linear in a positive factor of A
                advantages = advantages * rollout_is_weights
            width = response_mask.shape[-1]
            result = ops.policy_loss(
                log_prob, old_log_prob, advantages, response_mask, kind=kind, reduction=mode, **settings(kind, config),
                denominator=semantics.denominator(mode, width, dp_size, tokens, sequences, scale),
            )  # fmt: skip
            stats = result.stats.to_dict()  # the only wait for the device
            metrics = {
                "actor/pg_clipfrac": stats["clip_fraction_low"] + stats["clip_fraction_high"],
                "actor/ppo_kl": stats["approx_kl_k1"],
                "actor/pg_clipfrac_lower": stats["dual_clip_fraction"],
            }
            return aggregated(result.loss, mode, width, dp_size, sequences, scale), {} if kind == "gpg" else metrics

        loss.__name__ = loss.__qualname__ = f"fastrlhf_{kind}"
        return loss

    return build


def settings(kind: str, config: Any) -> dict[str, Any]:
    """Our arguments from verl's config, with its defaults."""
    if kind == "gpg":
        return {}
    if kind == "sapo":
        return {"tau_pos": float(config.tau_pos), "tau_neg": float(config.tau_neg), "ratio_clamp": 20.0}
    low = config.clip_ratio_low if config.clip_ratio_low is not None else config.clip_ratio
    high = config.clip_ratio_high if config.clip_ratio_high is not None else config.clip_ratio
    options: dict[str, Any] = {"clip_low": float(low), "clip_high": float(high)}
    if kind in ("ppo", "cispo"):
        options["ratio_clamp"] = 20.0
    if kind == "ppo":
        options["dual_clip"] = float(config.get("clip_ratio_c", 3.0))
    return options


# --- advantages --------------------------------------------------------------------------------------------------------------


def estimator(kind: str) -> Callable[[Any], Any]:
    """An advantage estimator of verl's signature for those it gives rewards, mask and group labels."""

    def build(module: Any) -> Any:
        def advantages(
            token_level_rewards: Tensor, response_mask: Tensor, index: Any = None, config: Any = None, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            if index is None:
                raise ValueError("index: the prompt of each answer is needed, got None")
            scores = token_level_rewards.sum(-1)
            ids = semantics.group_ids(index, scores.device)
            lengths = response_mask.sum(-1) if kind == "opo" else None
            out = ops.group_advantages(scores, ids, kind=kind, lengths=lengths).unsqueeze(-1) * response_mask
            return out, out

        advantages.__name__ = advantages.__qualname__ = f"fastrlhf_{kind}"
        return advantages

    return build


LOSS_ENTRIES: tuple[Entry, ...] = (
    *(
        Entry(ALGORITHMS, "POLICY_LOSS_REGISTRY", f"fastrlhf_{kind}", policy_loss(kind), "policy_loss")
        for kind in ("ppo", "gspo", "cispo", "sapo", "gpg")
    ),
    *(
        Entry(ALGORITHMS, "ADV_ESTIMATOR_REGISTRY", f"fastrlhf_{kind}", estimator(kind), "group_advantages")
        for kind in ("grpo", "dr_grpo", "rloo", "reinforce++", "opo")
    ),
)
