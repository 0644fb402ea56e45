"""verl's value loss, and our policy losses and advantages under names of their own in verl's registries."""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ..seam import Call, Calls, Entry, Sizes, decline, in_place_of
from . import semantics
from .inputs import inputs
from .verl_groups import calls, grouped

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


BY_SEQUENCE = ("gspo", "sapo")  # whose mode defaults to the mean over sequences


def policy_loss(kind: str) -> Callable[[Any], Any]:
    """A policy loss of verl's signature: its clip ranges, log-ratio clamp, dual clip and reductions from its config.

    Rollout weights multiply the loss; the statistics are taken without them.
    """

    def build(like: Any) -> Any:
        def loss(
            old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
            loss_agg_mode: str = "seq-mean-token-mean" if kind in BY_SEQUENCE else "token-mean", config: Any = None,
            rollout_is_weights: Tensor | None = None,
        ) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
            if config is None:
                raise ValueError("config: verl's actor config is needed, got None")
            info = dict(config.global_batch_info)
            mode = "seq-mean-token-mean" if kind == "sapo" else loss_agg_mode
            dp_size, tokens = info.get("dp_size", 1), info.get("batch_num_tokens")
            sequences, scale = info.get("global_batch_size"), info.get("loss_scale_factor")
            check_counts(mode, dp_size, tokens, sequences)
            width = response_mask.shape[-1]
            options = {
                "kind": kind, "reduction": mode, **settings(kind, config),
                "denominator": semantics.denominator(mode, width, dp_size, tokens, sequences, scale),
            }  # fmt: skip
            # every kind is linear in a factor of A that is not negative, which the weights are
            weighted = advantages if rollout_is_weights is None else advantages * rollout_is_weights
            value, stats = ops.policy_loss(log_prob, old_log_prob, weighted, response_mask, **options)
            value = aggregated(value, mode, width, dp_size, sequences, scale)
            if kind == "gpg":
                return value, {}
            if rollout_is_weights is not None:
                stats = ops.policy_loss(log_prob.detach(), old_log_prob, advantages, response_mask, **options).stats
            found = stats.to_dict()  # the only wait for the device
            return value, {
                "actor/pg_clipfrac": found["clip_fraction_low"] + found["clip_fraction_high"],
                "actor/ppo_kl": found["approx_kl_k1"],
                "actor/pg_clipfrac_lower": found["dual_clip_fraction"],
            }

        loss.__name__ = loss.__qualname__ = f"fastrlhf_{kind}"
        return loss

    return build


def loss_calls(kind: str) -> Calls:
    """In every mode; of gspo's gradient where verl's is that of its mean over sequences."""

    def calls(sizes: Sizes) -> Iterator[Call]:
        make = inputs(Sizes(sizes.rows, sizes.length, device=sizes.device))
        old, by_row = make.logprobs(), kind == "gspo"
        new = old + make.batch(0.5)

        def spread() -> Tensor:
            wide = make.normal(sizes.rows, 1).expand(sizes.rows, sizes.length).contiguous()
            return wide if by_row else make.batch()

        A, mask, weights = spread(), make.mask(torch.bool), spread().abs()
        weights[0] = 0
        if len(mask) > 2:
            mask[1] = False
        for mode in MODES:
            grads = (1,) if not by_row or mode == "seq-mean-token-mean" else ()
            for name, info in counts():
                for of, given in (("", {}), (", rollout weights", {"rollout_is_weights": weights})):
                    options = {"loss_agg_mode": mode, "config": actor_config(**info), **given}
                    lacks = ValueError if mode == "token-sum" else None  # 0.7, 0.8
                    yield Call(f"{mode}, {name}{of}", (old, new, A, mask), options, grads=grads, lacks=lacks)

    return calls


def actor_config(**info: Any) -> Any:
    ActorConfig = importlib.import_module("verl.workers.config").ActorConfig

    made = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.28,
        clip_ratio_c=3.0, tau_pos=1.0, tau_neg=1.05,
    )  # fmt: skip
    made.global_batch_info.update(info)
    return made


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
    """An advantage estimator of verl's signature for those it gives rewards, mask, group labels and its algorithm's config."""

    def build(like: Any) -> Any:
        def advantages(
            token_level_rewards: Tensor, response_mask: Tensor, index: Any = None, config: Any = None, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            if index is None:
                raise ValueError("index: the prompt of each answer is needed, got None")
            which = "dr_grpo" if kind == "grpo" and not by_deviation(config) else kind
            return grouped(token_level_rewards, response_mask, index, 1e-6, which)

        advantages.__name__ = advantages.__qualname__ = f"fastrlhf_{kind}"
        return advantages

    return build


def by_deviation(config: Any) -> bool:
    return bool(getattr(config, "norm_adv_by_std_in_grpo", True))


def called_as_estimator(scaled: Callable[[Any], bool] | None = None) -> Callable[[Any], Any]:
    """How verl's own is called with what ours is given; GRPO's is told whether to divide by the deviation."""

    def function(held: Any) -> Any:
        def call(token_level_rewards: Tensor, response_mask: Tensor, index: Any, config: Any = None) -> Any:
            told = {} if scaled is None else {"norm_adv_by_std_in_grpo": scaled(config)}
            return held(token_level_rewards, response_mask, index, config=config, **told)

        return call

    return function


def estimator_calls(sizes: Sizes) -> Iterator[Call]:
    for call in calls(sizes):
        if len(call.args) == 3:  # without an epsilon of its own, for which verl has no configuration
            yield call
            config = types.SimpleNamespace(norm_adv_by_std_in_grpo=False)
            yield Call(f"{call.name}, not divided by the deviation", call.args, {"config": config}, tolerance=call.tolerance)


def loss_entry(kind: str, like: str) -> Entry:
    registry = "POLICY_LOSS_REGISTRY"
    return Entry(ALGORITHMS, registry, f"fastrlhf_{kind}", policy_loss(kind), "policy_loss", like, loss_calls(kind))


def estimator_entry(kind: str, like: str, scaled: Callable[[Any], bool] | None = None) -> Entry:
    return Entry(
        ALGORITHMS, "ADV_ESTIMATOR_REGISTRY", f"fastrlhf_{kind}", estimator(kind), "group_advantages", like, estimator_calls,
        function=called_as_estimator(scaled),
    )  # fmt: skip


LOSS_ENTRIES: tuple[Entry, ...] = (
    loss_entry("ppo", "vanilla"),
    *(loss_entry(kind, kind) for kind in ("gspo", "cispo", "sapo", "gpg")),
    estimator_entry("grpo", "grpo", by_deviation),
    estimator_entry("dr_grpo", "grpo", lambda config: False),
    estimator_entry("rloo", "rloo"),
    estimator_entry("opo", "opo"),
    Entry(
        ALGORITHMS, "ADV_ESTIMATOR_REGISTRY", "fastrlhf_reinforce++", estimator("reinforce++"), "group_advantages",
        unverified="it is whitened over answers, verl's reinforce_plus_plus_baseline over tokens",
    ),
)  # fmt: skip
