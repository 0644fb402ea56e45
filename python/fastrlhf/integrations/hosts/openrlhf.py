"""OpenRLHF's seams, read in and run against 0.11.2."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ..seam import Call, Host, Seam, Sizes, decline, in_place_of, obstacle
from . import semantics
from .inputs import inputs

UTILS, LOSS, EXPERIENCE = "openrlhf.models.utils", "openrlhf.models.loss", "openrlhf.trainer.ppo_utils.experience_maker"
MAKER = "RemoteExperienceMaker"


def log_probs_from_logits(original: Any) -> Any:
    @in_place_of(original)
    def replacement(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
        reason = obstacle(logits)
        if reason is not None:
            decline("openrlhf log_probs_from_logits", reason)
            return original(logits, labels, temperature)
        if temperature != 1.0:
            logits.div_(temperature)  # the caller takes the entropy of the same tensor
        ignored = -100 if semantics.flash_attention() else semantics.NO_LABEL
        return semantics.logprobs(logits, labels, ignore_index=ignored)

    return replacement


def logits_calls(sizes: Sizes) -> Iterator[Call]:
    make = inputs(sizes)
    x, y = make.logits(sizes.rows, sizes.length), make.labels(sizes.rows, sizes.length)
    loose = None if sizes.dtype == torch.float32 else 2e-2
    yield Call("plain", (x, y), grads=(0,), tolerance=loose)
    yield Call("temperature", (x, y, 0.7), grads=(0,), tolerance=loose)
    if sizes == Sizes():
        yield Call("bfloat16", (x.bfloat16(), y), grads=(0,), tolerance=2e-2)
        yield Call("float64", (x.double(), y), grads=(0,))


def temper(original: Any) -> Any:
    """What `log_probs_from_logits` leaves in the logits is part of its result."""

    def call(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        out = original(logits, labels, temperature)
        return out, logits

    return call


def compute_entropy(original: Any) -> Any:
    @in_place_of(original)
    def replacement(logits: Tensor) -> Tensor:
        reason = obstacle(logits)
        if reason is not None:
            decline("openrlhf compute_entropy", reason)
            return original(logits)
        return semantics.entropy(logits)

    return replacement


def uncompiled(held: Any) -> Any:
    """OpenRLHF's is under torch.compile, which would take seconds to compare with."""
    return getattr(held, "_torchdynamo_orig_callable", held)


def entropy_calls(sizes: Sizes) -> Iterator[Call]:
    make = inputs(sizes)
    x = make.logits(sizes.rows, sizes.length)
    yield Call("plain", (x,), grads=(0,), tolerance=None if sizes.dtype == torch.float32 else 0.1)
    masked = make.logits(sizes.rows, sizes.length)
    masked[..., ::3] = -torch.inf
    yield Call("-inf logits", (masked,), differs="0 · -inf is NaN in the host's entropy")


def masked_mean(original: Any) -> Any:
    @in_place_of(original)
    def replacement(tensor: Any, mask: Any, dim: Any = None) -> Tensor:
        reason = "no mask" if mask is None else semantics.statistics_obstacle(tensor, mask)
        if reason is not None or not (dim is None or isinstance(dim, int)):
            decline("openrlhf masked_mean", reason or f"dim {dim}")
            return original(tensor, mask, dim)
        mean = ops.masked_mean(tensor, mask, dim)
        return torch.where(mask.sum(dim) != 0, mean, torch.nan)  # the host divides by 0

    return replacement


def mean_calls(sizes: Sizes) -> Iterator[Call]:
    make = inputs(sizes)
    x = make.batch()
    for dtype in (torch.float32, torch.bool, torch.int64):
        yield Call(f"{dtype} mask with gaps", (x, make.mask(dtype)), grads=(0,))
        yield Call(f"{dtype} mask with gaps, dim -1", (x, make.mask(dtype), -1), grads=(0,))
    yield Call("an empty mask", (x, torch.zeros_like(x)))
    yield Call("no mask", (x, None))


def compute_approx_kl(original: Any) -> Any:
    @in_place_of(original)
    def replacement(
        log_probs: Tensor, log_probs_base: Tensor, log_probs_old: Tensor | None = None, kl_estimator: str = "k1",
        unbiased_gradient: bool = False,
    ) -> Tensor:  # fmt: skip
        reason = obstacle(log_probs, "kl") or obstacle(log_probs_base, "kl")
        if reason is None and (kl_estimator not in ("k1", "k2", "k3") or log_probs.shape != log_probs_base.shape):
            reason = "another estimator or two shapes"
        if reason is not None:
            decline("openrlhf compute_approx_kl", reason)
            return original(log_probs, log_probs_base, log_probs_old, kl_estimator, unbiased_gradient)
        # the host bounds k3's log-ratio at -10 alone; both results are at the output's bound beyond that
        new, base = log_probs.float(), log_probs_base.float()
        value = ops.kl(new, base, kind=kl_estimator, clamp_input=20.0 if kl_estimator == "k3" else None, clamp_output=10.0)
        if not unbiased_gradient:
            return value
        k2 = ops.kl(new, base, kind="k2")
        surrogate = k2 - k2.detach()
        if log_probs_old is not None:
            surrogate = surrogate * (new - log_probs_old.float()).exp().clamp(max=10.0).detach()
        return value.detach() + surrogate

    return replacement


def kl_calls(sizes: Sizes) -> Iterator[Call]:
    make = inputs(sizes)
    a, b, old = make.batch(2.0), make.batch(2.0), make.batch(2.0)
    far = make.batch(60.0)
    for kind in ("k3", "k2", "k1"):
        yield Call(kind, (a, b), {"kl_estimator": kind}, grads=(0, 1))
        yield Call(f"{kind} where clamps bite", (far, b), {"kl_estimator": kind}, grads=(0,))
        yield Call(f"{kind}, unbiased gradient", (a, b), {"kl_estimator": kind, "unbiased_gradient": True}, grads=(0,))
        given = {"kl_estimator": kind, "unbiased_gradient": True, "log_probs_old": old}
        yield Call(f"{kind}, unbiased gradient, off-policy", (a, b), given, grads=(0,))
    yield Call("an unknown estimator", (a, b), {"kl_estimator": "k9"}, raises=ValueError)


# --- losses ------------------------------------------------------------------------------------------------------------------


def _loss_obstacle(x: Tensor, mask: Any, *others: Tensor) -> str | None:
    if mask is None:
        return "no mask"
    reason = semantics.statistics_obstacle(x, mask)
    if reason is None and any(t.dtype != torch.float32 or t.shape != x.shape for t in others):
        reason = "inputs of other dtypes or shapes"
    return reason


def policy_loss(original: Any) -> Any:
    @in_place_of(original)
    def forward(
        self: Any, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None, dp_size: int = 1, batch_num_tokens: Any = None, global_batch_size: Any = None,
    ) -> Any:  # fmt: skip
        reason = _loss_obstacle(log_probs, action_mask, old_log_probs, advantages)
        if reason is None and self.is_correction_level != "off":
            reason = "a rollout correction"
        if reason is None and (
            self.policy_loss_type not in ("ppo", "gspo") or (self.policy_loss_type == "gspo" and self.dual_clip)
        ):
            reason = "another loss"
        if reason is not None:
            decline("openrlhf PolicyLoss", reason)
            return original(
                self, log_probs, old_log_probs, advantages, action_mask, rollout_log_probs, dp_size, batch_num_tokens,
                global_batch_size,
            )  # fmt: skip
        mode = "token-mean" if self.token_level_loss else "seq-mean-token-mean"
        over = semantics.denominator(mode, 0, dp_size, batch_num_tokens, global_batch_size)
        ppo = self.policy_loss_type == "ppo"
        loss, stats = ops.policy_loss(
            log_probs, old_log_probs, advantages, action_mask, kind=self.policy_loss_type, clip_low=self.clip_eps_low,
            clip_high=self.clip_eps_high, dual_clip=self.dual_clip, ratio_clamp=20.0 if ppo else None, reduction=mode,
            denominator=over,
        )  # fmt: skip
        with torch.no_grad():
            ppo_kl = ops.masked_mean(old_log_probs - log_probs, action_mask)  # of the log-ratio before its clamp
        return loss, stats.get("clip_fraction_low") + stats.get("clip_fraction_high"), ppo_kl, None, None

    return forward


def value_loss(original: Any) -> Any:
    @in_place_of(original)
    def forward(
        self: Any, values: Tensor, old_values: Tensor, returns: Tensor, action_mask: Tensor | None = None, dp_size: int = 1,
        batch_num_tokens: Any = None, global_batch_size: Any = None,
    ) -> Tensor:  # fmt: skip
        reason = _loss_obstacle(values, action_mask, old_values, returns)
        if reason is not None:
            decline("openrlhf ValueLoss", reason)
            return original(self, values, old_values, returns, action_mask, dp_size, batch_num_tokens, global_batch_size)
        mode = "token-mean" if self.token_level_loss else "seq-mean-token-mean"
        over = semantics.denominator(mode, 0, dp_size, batch_num_tokens, global_batch_size)
        return ops.value_loss(
            values, old_values, returns, action_mask, clip=self.clip_eps or None, reduction=mode, denominator=over
        ).loss

    return forward


def _self(**attributes: Any) -> Any:
    return types.SimpleNamespace(**attributes)


GLOBAL = {"dp_size": 2, "batch_num_tokens": 57.0, "global_batch_size": 9.0}


def policy_loss_calls(sizes: Sizes) -> Iterator[Call]:
    make = inputs(sizes)
    old = make.logprobs()
    for kind, dual, per_token in (("ppo", None, True), ("ppo", 3.0, True), ("ppo", None, False), ("gspo", None, False)):
        this = _self(
            clip_eps_low=0.2, clip_eps_high=0.28, dual_clip=dual, token_level_loss=per_token, policy_loss_type=kind,
            is_correction_level="off",
        )  # fmt: skip
        advantages = make.batch() if kind == "ppo" else make.normal(sizes.rows, 1).expand(sizes.rows, sizes.length).contiguous()
        for name, options in (("local counts", {}), ("global counts", GLOBAL)):
            for dtype in (torch.float32, torch.bool):
                m = make.mask(dtype)
                args = (this, old + make.batch(0.5), old, advantages, m)
                yield Call(f"{kind}, dual clip {dual}, {name}, {dtype} mask", args, dict(options), grads=(1,))
    if sizes.dtype == torch.float32:
        ppo = _self(**(vars(this) | {"policy_loss_type": "ppo", "token_level_loss": True}))
        yield Call("log-ratios of 60", (ppo, old + make.batch(60.0), old, advantages, make.mask()), grads=(1,), tolerance=1e-3)
        nothing = torch.zeros_like(old)
        yield Call("all masked", (ppo, old, old, advantages, nothing), differs="0 / 0 is NaN in the host's mean")


def value_loss_calls(sizes: Sizes) -> Iterator[Call]:
    make = inputs(sizes)
    v, old, r = make.batch(), make.batch(), make.batch()
    for clip in (0.2, None):
        for per_token in (True, False):
            for name, options in (("local counts", {}), ("global counts", GLOBAL)):
                this = _self(clip_eps=clip, token_level_loss=per_token)
                yield Call(
                    f"clip {clip}, per token {per_token}, {name}", (this, v, old, r, make.mask()), dict(options), grads=(1,)
                )


# --- advantages --------------------------------------------------------------------------------------------------------------


def advantages_and_returns(original: Any) -> Any:
    @in_place_of(original)
    def replacement(
        self: Any, values: Tensor, rewards: Tensor, action_mask: Tensor | None, gamma: float, lambd: float
    ) -> tuple[Tensor, Tensor]:
        reason = _loss_obstacle(rewards, action_mask, values)
        if reason is not None:
            decline("openrlhf get_advantages_and_returns", reason)
            return original(self, values, rewards, action_mask, gamma, lambd)
        return ops.gae(rewards.detach(), values.detach(), action_mask, gamma=gamma, lam=lambd, mask_mode="zero")

    return replacement


def cumulative_returns(original: Any) -> Any:
    @in_place_of(original)
    def replacement(self: Any, rewards: Tensor, action_mask: Tensor | None, gamma: float) -> Tensor:
        reason = _loss_obstacle(rewards, action_mask)
        if reason is not None:
            decline("openrlhf get_cumulative_returns", reason)
            return original(self, rewards, action_mask, gamma)
        r = rewards.detach()
        return ops.gae(r, torch.zeros_like(r), action_mask, gamma=gamma, lam=1.0, mask_mode="zero")[0]

    return replacement


def recursion_calls(values: bool) -> Callable[[Sizes], Iterator[Call]]:
    def calls(sizes: Sizes) -> Iterator[Call]:
        make = inputs(sizes)
        arrays = (make.batch(), make.batch()) if values else (make.batch(),)
        for dtype in (torch.float32, torch.bool, torch.int64):
            for numbers in ((0.99, 0.95), (1.0, 1.0)):
                rest = numbers if values else numbers[:1]
                yield Call(f"{dtype} mask with gaps, {numbers}", (None, *arrays, make.mask(dtype), *rest), tolerance=1e-4)
        yield Call("no mask", (None, *arrays, None, *((0.9, 0.9) if values else (0.9,))))

    return calls


SEAMS = (
    Seam(UTILS, "log_probs_from_logits", log_probs_from_logits, logits_calls, "logprobs", function=temper),
    Seam(UTILS, "compute_entropy", compute_entropy, entropy_calls, "logprobs", function=uncompiled),
    Seam(UTILS, "masked_mean", masked_mean, mean_calls, "masked_mean"),
    Seam(UTILS, "compute_approx_kl", compute_approx_kl, kl_calls, "kl"),
    Seam(LOSS, "PolicyLoss.forward", policy_loss, policy_loss_calls, "policy_loss"),
    Seam(LOSS, "ValueLoss.forward", value_loss, value_loss_calls, "value_loss"),
    Seam(
        EXPERIENCE, f"{MAKER}.get_advantages_and_returns", advantages_and_returns, recursion_calls(True), "gae", on_import=True
    ),
    Seam(EXPERIENCE, f"{MAKER}.get_cumulative_returns", cumulative_returns, recursion_calls(False), "gae", on_import=True),
)
HOST = Host("openrlhf", "openrlhf", "openrlhf", ("0.11", "0.11"), SEAMS)
