"""slime's seams, read in its sources of 0.3.1; it cannot be installed from a package index, and the tests run against functions
written from the same contract. What does not agree where it is installed does not go live."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ..seam import Call, Host, Seam, Sizes, decline, in_place_of, obstacle
from . import semantics
from .inputs import inputs
from .nemo_rl import alone
from .openrlhf import uncompiled

UTILS = "slime.utils.ppo_utils"


def log_probs_and_entropy(original: Any) -> Any:
    """log-probs (T, 1) and entropy (T) of packed rows; where a keep mask is given, under the softmax of what it keeps."""

    @in_place_of(original)
    def replacement(
        logits: Tensor, tokens: Tensor, tp_group: Any, with_entropy: bool = False, chunk_size: int = -1,
        log_prob_keep_mask: Tensor | None = None, with_entropy_grad: bool = True,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        reason = obstacle(logits)
        if reason is None and (logits.numel() == 0 or logits.dim() != 2):
            reason = "no rows, or another shape"
        if reason is None and log_prob_keep_mask is not None and with_entropy:
            reason = "a keep mask and the entropy of all"
        if reason is not None:
            decline("slime calculate_log_probs_and_entropy", reason)
            options: dict[str, Any] = {"with_entropy": with_entropy}
            if chunk_size != -1 or log_prob_keep_mask is not None or not with_entropy_grad:
                options |= {
                    "chunk_size": chunk_size,
                    "log_prob_keep_mask": log_prob_keep_mask,
                    "with_entropy_grad": with_entropy_grad,
                }
            return original(logits, tokens, tp_group, **options)
        out = ops.logprobs(
            logits, tokens, entropy=with_entropy, kept=log_prob_keep_mask, ignore_index=semantics.NO_LABEL,
            vocab_parallel=semantics.own_shard(logits, tp_group),
        )  # fmt: skip
        entropy = out.entropy if with_entropy_grad or out.entropy is None else out.entropy.detach()
        return out.logprobs.unsqueeze(-1), entropy

    return replacement


def logits_calls(sizes: Sizes) -> Iterator[Call]:
    make = inputs(Sizes(sizes.rows, sizes.length, sizes.vocab, device=sizes.device))
    x, y = make.logits(sizes.rows * sizes.length), make.labels(sizes.rows * sizes.length)
    yield Call("one rank, entropy", (x, y, alone(), True), grads=(0,))
    yield Call("one rank", (x, y, alone()), grads=(0,))


def vanilla_gae(original: Any) -> Any:
    @in_place_of(original)
    def replacement(rewards: Tensor, values: Tensor, gamma: float, lambd: float) -> tuple[Tensor, Tensor]:
        return _gae(original, rewards, values, gamma, lambd)

    return replacement


def chunked_gae(original: Any) -> Any:
    @in_place_of(original)
    def replacement(
        rewards: Tensor, values: Tensor, gamma: float, lambd: float, chunk_size: int = 128
    ) -> tuple[Tensor, Tensor]:
        return _gae(original, rewards, values, gamma, lambd, chunk_size)

    return replacement


def _gae(original: Any, rewards: Tensor, values: Tensor, gamma: float, lambd: float, *rest: int) -> tuple[Tensor, Tensor]:
    reason = obstacle(rewards, "gae") or obstacle(values, "gae")
    if reason is None and (rewards.dtype != torch.float32 or values.dtype != torch.float32):
        reason = "rewards or values that are not float32"
    if reason is not None:
        decline(f"slime {original.__name__}", reason)
        out: tuple[Tensor, Tensor] = original(rewards, values, gamma, lambd, *rest)
        return out
    return ops.gae(rewards.detach(), values.detach(), gamma=gamma, lam=lambd, mask_mode="none")


def gae_calls(sizes: Sizes) -> Iterator[Call]:
    make = inputs(Sizes(sizes.rows, sizes.length, device=sizes.device))
    long = inputs(Sizes(sizes.rows, 300, device=sizes.device))
    for gamma, lam in ((0.99, 0.95), (1.0, 1.0), (0.9, 0.0)):
        yield Call(f"gamma {gamma}, lambda {lam}", (make.batch(), make.batch(), gamma, lam), tolerance=1e-4)
        yield Call(f"300 tokens, gamma {gamma}, lambda {lam}", (long.batch(), long.batch(), gamma, lam), tolerance=1e-4)


def compute_approx_kl(original: Any) -> Any:
    @in_place_of(original)
    def replacement(
        log_probs: Tensor, log_probs_base: Tensor, kl_loss_type: str, importance_ratio: Tensor | None = None
    ) -> Tensor:
        kinds = {"k1": "k1", "k2": "k2", "k3": "k3", "low_var_kl": "k3"}
        reason = obstacle(log_probs, "kl") or obstacle(log_probs_base, "kl")
        if reason is None and (
            kl_loss_type not in kinds or importance_ratio is not None or log_probs.shape != log_probs_base.shape
        ):
            reason = "another type, an importance ratio or two shapes"
        if reason is not None:
            decline("slime compute_approx_kl", reason)
            return original(log_probs, log_probs_base, kl_loss_type, importance_ratio)
        bound = 10.0 if kl_loss_type == "low_var_kl" else None
        return ops.kl(log_probs.float(), log_probs_base.float(), kind=kinds[kl_loss_type], clamp_output=bound)

    return replacement


def kl_calls(sizes: Sizes) -> Iterator[Call]:
    make = inputs(Sizes(sizes.rows, sizes.length, device=sizes.device))
    a, b = make.batch(2.0), make.batch(2.0)
    for kind in ("low_var_kl", "k3", "k2", "k1"):
        yield Call(kind, (a, b, kind), grads=(0, 1))
    yield Call("low_var_kl where the clamp bites", (make.batch(5.0), b, "low_var_kl"), grads=(0,))
    yield Call("an unknown type", (a, b, "k9"), raises=ValueError)


SEAMS = (
    Seam(UTILS, "calculate_log_probs_and_entropy", log_probs_and_entropy, logits_calls, "logprobs", on_import=True),
    Seam(UTILS, "chunked_gae", chunked_gae, gae_calls, "gae", on_import=True),
    Seam(UTILS, "vanilla_gae", vanilla_gae, gae_calls, "gae", on_import=True),
    Seam(UTILS, "compute_approx_kl", compute_approx_kl, kl_calls, "kl", on_import=True, function=uncompiled),
)
HOST = Host("slime", "slime", "slime", ("0.3", "0.3"), SEAMS)
