"""Policy and value losses: the number and its statistics."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from .native import address, bound, extension, number, one_of, rows, same_shape, tokens, wide
from .rollouts import _first
from .softmax import KINDS
from .view import FLOATS, MASKS, View, view

POLICY_KINDS = ("ppo", "reinforce", "cispo", "sapo", "gspo", "gmpo")
REDUCTIONS = ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
POLICY_STATS = (
    "clip_fraction_low", "clip_fraction_high", "dual_clip_fraction", "ratio_mean", "ratio_min", "ratio_max", "approx_kl_k1",
    "approx_kl_k3", "ref_kl", "entropy", "tokens", "rollout_mismatch_mean", "rollout_mismatch_max", "rollout_weight_mean",
    "rollout_corrected_fraction",
)  # fmt: skip
VALUE_STATS = ("clip_fraction", "explained_variance", "value_mean", "return_mean", "tokens")


class LossAndStats(NamedTuple):
    """`loss` a float, `stats` floats by name."""

    loss: float
    stats: dict[str, float]


def policy_loss(
    logprobs: Any, old_logprobs: Any, advantages: Any, mask: Any = None, *, kind: str = "ppo", clip_low: float = 0.2,
    clip_high: float = 0.2, dual_clip: float | None = None, ratio_clamp: float | None = None, delta: float | None = None,
    tau_pos: float = 1.0, tau_neg: float = 1.05, rollout_logprobs: Any = None, ref_logprobs: Any = None, kl_coef: float = 0.0,
    kl: str = "k3", entropy: Any = None, entropy_coef: float = 0.0, reduction: str = "token-mean",
    denominator: float | None = None, cu_seqlens: Any = None,
) -> LossAndStats:  # fmt: skip
    """`fastrlhf.policy_loss`, without the rollout correction: rollout_logprobs give the statistics of the mismatch."""
    lp, cu = _first("logprobs", logprobs, cu_seqlens)
    named = {
        "old_logprobs": old_logprobs,
        "rollout_logprobs": rollout_logprobs,
        "ref_logprobs": ref_logprobs,
        "entropy": entropy,
    }
    arrays = {name: _optional(name, x, lp) for name, x in named.items()}
    if arrays["old_logprobs"] is None:
        raise TypeError("old_logprobs: expected an array, got None")
    a = view("advantages", advantages, FLOATS)
    per_row = a.shape != lp.shape
    if per_row and a.shape != (rows(lp, cu)[0],):
        raise ValueError(f"advantages: expected the shape of logprobs, {lp.shape}, or ({rows(lp, cu)[0]},), got {a.shape}")
    if kl_coef != 0 and arrays["ref_logprobs"] is None:
        raise ValueError(f"ref_logprobs: needed for kl_coef={kl_coef}, got None")
    if entropy_coef != 0 and arrays["entropy"] is None:
        raise ValueError(f"entropy: needed for entropy_coef={entropy_coef}, got None")
    if dual_clip is not None and not number("dual_clip", dual_clip) > 1:
        raise ValueError(f"dual_clip: expected a number > 1, got {dual_clip}")
    numbers = (
        number("clip_low", clip_low, 0.0), number("clip_high", clip_high, 0.0), dual_clip or math.inf,
        bound("ratio_clamp", ratio_clamp), bound("delta", delta), bound("tau_pos", tau_pos), bound("tau_neg", tau_neg),
        0.0, 0.0,
        number("kl_coef", kl_coef), number("entropy_coef", entropy_coef),
        math.nan if denominator is None else bound("denominator", denominator),
    )  # fmt: skip
    kind = "reinforce" if kind == "gpg" else kind
    codes = (one_of("kind", kind, POLICY_KINDS), 0, 0, one_of("kl", kl, KINDS), one_of("reduction", reduction, REDUCTIONS))
    native, lane = extension("policy_loss", lp)
    f64 = wide(lp, arrays["old_logprobs"], a)
    loss, stats = empty_results(f64, POLICY_STATS)
    native.policy_loss(
        rows(lp, cu), f64,
        (
            tokens(lp), tokens(arrays["old_logprobs"]), tokens(a, per_row), tokens(_optional("mask", mask, lp, MASKS)),
            tokens(arrays["rollout_logprobs"]), tokens(arrays["ref_logprobs"]), tokens(arrays["entropy"]),
        ),
        numbers, codes, 0, 0, address(loss), address(stats), lane,
    )  # fmt: skip
    return with_names(loss, stats, POLICY_STATS)


def value_loss(
    values: Any, old_values: Any, returns: Any, mask: Any = None, *, clip: float | None = 0.2, reduction: str = "token-mean",
    denominator: float | None = None, cu_seqlens: Any = None,
) -> LossAndStats:  # fmt: skip
    """`fastrlhf.value_loss`."""
    v, cu = _first("values", values, cu_seqlens)
    old, target = _optional("old_values", old_values, v), _optional("returns", returns, v)
    if target is None:
        raise TypeError("returns: expected an array, got None")
    if old is None and clip is not None:
        raise ValueError(f"old_values: needed for clip={clip}, got None")
    native, lane = extension("value_loss", v)
    f64 = wide(v, target)
    loss, stats = empty_results(f64, VALUE_STATS)
    native.value_loss(
        rows(v, cu), f64, tokens(v), tokens(old), tokens(target), tokens(_optional("mask", mask, v, MASKS)),
        bound("clip", clip),
        one_of("reduction", reduction, REDUCTIONS), math.nan if denominator is None else bound("denominator", denominator), 0,
        address(loss), address(stats), lane,
    )  # fmt: skip
    return with_names(loss, stats, VALUE_STATS)


def _optional(name: str, x: Any, first: View, dtypes: tuple[str, ...] = FLOATS) -> View | None:
    v = None if x is None else view(name, x, dtypes)
    same_shape(name, v, "the first argument", first)
    return v


def empty_results(float64: bool, names: tuple[str, ...]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    return np.empty((), np.float64 if float64 else np.float32), np.empty(len(names), np.float32)


def with_names(loss: np.ndarray[Any, Any], stats: np.ndarray[Any, Any], names: tuple[str, ...]) -> LossAndStats:
    return LossAndStats(float(loss), dict(zip(names, map(float, stats), strict=True)))
