"""Rewards, advantages and returns of sampled sequences, each alone or all in one pass."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.gae import reference
from ..kernels.kl.reference import KINDS
from . import checks, value_checks
from .backend import (
    address,
    choose,
    empties,
    extension,
    native,
    raw_stream,
    result_dtype_on,
    row_shape,
    row_values,
    threads,
    tokens,
    triton_kernels,
)
from .library import Op
from .masked_stats import moments, standardize_by
from .masked_stats import whiten as masked_whiten


class Experience(NamedTuple):
    """Results of `experience`, each of logprobs' shape, float32 (float64 for float64 inputs)."""

    rewards: Tensor
    kl: Tensor
    advantages: Tensor
    returns: Tensor


def shape_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None,
    *,
    kl_coef: float,
    kl: str = "k1",
    score_clip: float | None = None,
    kl_clip: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-token rewards: the KL penalty everywhere, the sequence's score at its last counted token.

    rewards_t = -kl_coef·kl_t·m_t, + clip(score, ±score_clip) at the last token with m_t != 0. No gradient.

    Args:
        scores: (B).
        logprobs, ref_logprobs: (B, T), or packed (total) with `cu_seqlens`.
        mask: of the same shape, != 0 counts; None counts all. A sequence without a counted token keeps no score.
        kl_coef: >= 0 usually; any finite number.
        kl: the estimator, see `kl`: "k1", "abs", "k2" or "k3".
        score_clip, kl_clip: bounds, ±; None for none.
        cu_seqlens: (B + 1), int32 or int64, of a pack.
        backend: "cuda", "triton", "cpu" or "reference"; None chooses.

    Returns:
        (rewards, kl), float32 (float64 for float64 inputs); kl is 0 where the mask is.

    Raises:
        TypeError, ValueError: dtype, shape or device that do not fit, cu_seqlens that fall or do not end at the number
        of tokens.

    Source: Ziegler et al. 2019; Ouyang et al. 2022.
    """
    cu = _check_shaping(scores, logprobs, ref_logprobs, mask, kl_coef, score_clip, kl_clip, cu_seqlens)
    code = checks.one_of("kl", kl, KINDS)
    backend = choose("shape_rewards", logprobs, backend)
    if backend == "reference":
        with torch.no_grad():
            return _reference_shaping(scores, logprobs, ref_logprobs, mask, cu, kl_coef, kl, score_clip, kl_clip)
    rewards, kls, *_ = _rollout(
        logprobs, None, scores, ref_logprobs, None, mask, None, cu, None,
        [float(kl_coef), score_clip or math.inf, kl_clip or math.inf, 1.0, 1.0], [code, 0], False, backend,
    )  # fmt: skip
    return rewards, kls


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    mask_mode: str = "carry",
    bootstrap: Tensor | None = None,
    whiten: bool = False,
    group: Any = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation.

    δ_t = r_t + γ V_{t+1} - V_t,  A_t = δ_t + γλ A_{t+1},  returns = A + V (before whitening). No gradient.

    Args:
        rewards, values: (B, T), or packed (total) with `cu_seqlens`: nothing crosses a boundary.
        mask: of the same shape; None counts all.
        cu_seqlens: (B + 1), int32 or int64.
        gamma: in [0, 1].
        lam: in [0, 1], a number or (B) one for each sequence.
        mask_mode: ``carry`` (verl, NeMo-RL): over a token with mask 0 the next value and A pass unchanged, and A there
            is what passes; ``zero`` (OpenRLHF, NeMo-Aligner): rewards and values are multiplied by the mask, A decays
            through gaps; ``none``: the mask is not used in the recursion.
        bootstrap: (B), the value after the last token; 0 if None.
        whiten: advantages to zero mean and unit (unbiased) variance over the mask, eps 1e-8, zeros where it is 0.
        group: a process group to whiten over.
        backend: "cuda", "triton", "cpu" or "reference"; None chooses.

    Returns:
        (advantages, returns), rewards' shape, float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: dtype, shape or device that do not fit, gamma or lam outside [0, 1] or NaN, cu_seqlens
        that fall or do not end at the number of tokens.

    Source: Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation".
    """
    cu = checks.token_matrix("rewards", rewards, cu_seqlens)
    checks.like("values", values, "rewards", rewards)
    if mask is not None:
        checks.like("mask", mask, "rewards", rewards, checks.MASKS)
    mode, lams, lam_value = _check_recursion(rewards, cu, gamma, lam, mask_mode, bootstrap)
    backend = choose("gae", rewards, backend)
    if backend == "reference":
        with torch.no_grad():
            a, returns = _reference_gae(rewards, values, mask, cu, gamma, lam, mask_mode, bootstrap)
            return _whitened(a, mask, group, backend) if whiten else a, returns
    _, _, advantages, returns = _rollout(
        rewards, rewards, None, None, values, mask, bootstrap, cu, lams,
        [0.0, math.inf, math.inf, float(gamma), lam_value], [0, mode], whiten and group is None, backend,
    )  # fmt: skip
    if whiten and group is not None:
        advantages = _whitened(advantages, mask, group, backend)
    return advantages, returns


def discounted_returns(
    rewards: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    gamma: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Rewards to go: G_t = r_t + γ G_{t+1}. A token with mask 0 is passed over: its reward does not count, G there is
    what passes. The same as `gae` with λ = 1 and no values. No gradient.

    Args:
        rewards: (B, T), or packed (total) with `cu_seqlens`.
        mask: of the same shape; None counts all.
        cu_seqlens: (B + 1), int32 or int64.
        gamma: in [0, 1].
        backend: "cuda", "triton", "cpu" or "reference"; None chooses.

    Returns:
        rewards' shape, float32 (float64 for float64 rewards).

    Raises:
        TypeError, ValueError: as for `gae`.
    """
    cu = checks.token_matrix("rewards", rewards, cu_seqlens)
    if mask is not None:
        checks.like("mask", mask, "rewards", rewards, checks.MASKS)
    checks.number("gamma", gamma, low=0, high=1)
    backend = choose("discounted_returns", rewards, backend)
    if backend == "reference":
        with torch.no_grad():
            return _reference_gae(rewards, torch.zeros_like(rewards), mask, cu, gamma, 1.0, "carry", None)[0]
    out: Tensor = _rollout(
        rewards, rewards, None, None, None, mask, None, cu, None,
        [0.0, math.inf, math.inf, float(gamma), 1.0], [0, 0], False, backend,
    )[2]  # fmt: skip
    return out


def experience(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor | None,
    *,
    kl_coef: float,
    kl: str = "k1",
    score_clip: float | None = None,
    kl_clip: float | None = None,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    mask_mode: str = "carry",
    bootstrap: Tensor | None = None,
    whiten: bool = False,
    cu_seqlens: Tensor | None = None,
    group: Any = None,
    backend: str | None = None,
) -> Experience:
    """`shape_rewards` and `gae` in one pass over the rows: everything PPO needs of a rollout. No gradient.

    Arguments, results and errors are theirs; the results are theirs to the bit.
    """
    cu = _check_shaping(scores, logprobs, ref_logprobs, mask, kl_coef, score_clip, kl_clip, cu_seqlens)
    code = checks.one_of("kl", kl, KINDS)
    checks.like("values", values, "logprobs", logprobs)
    mode, lams, lam_value = _check_recursion(logprobs, cu, gamma, lam, mask_mode, bootstrap)
    backend = choose("experience", logprobs, backend)
    if backend == "reference":
        with torch.no_grad():
            rewards, kls = _reference_shaping(scores, logprobs, ref_logprobs, mask, cu, kl_coef, kl, score_clip, kl_clip)
            a, returns = _reference_gae(rewards, values, mask, cu, gamma, lam, mask_mode, bootstrap)
            return Experience(rewards, kls, _whitened(a, mask, group, backend) if whiten else a, returns)
    rewards, kls, advantages, returns = _rollout(
        logprobs, None, scores, ref_logprobs, values, mask, bootstrap, cu, lams,
        [float(kl_coef), score_clip or math.inf, kl_clip or math.inf, float(gamma), lam_value], [code, mode],
        whiten and group is None, backend,
    )  # fmt: skip
    if whiten and group is not None:
        advantages = _whitened(advantages, mask, group, backend)
    return Experience(rewards, kls, advantages, returns)


def _check_shaping(
    scores: Any, logprobs: Any, ref_logprobs: Any, mask: Any, kl_coef: Any, score_clip: Any, kl_clip: Any, cu_seqlens: Any
) -> Tensor | None:
    cu = checks.token_matrix("logprobs", logprobs, cu_seqlens)
    checks.like("ref_logprobs", ref_logprobs, "logprobs", logprobs)
    if mask is not None:
        checks.like("mask", mask, "logprobs", logprobs, checks.MASKS)
    checks.rows("scores", scores, checks.row_count(logprobs, cu), "sequence", logprobs)
    checks.number("kl_coef", kl_coef)
    checks.positive_or_none("score_clip", score_clip)
    checks.positive_or_none("kl_clip", kl_clip)
    return cu


def _check_recursion(
    like: Tensor, cu: Tensor | None, gamma: Any, lam: Any, mask_mode: Any, bootstrap: Any
) -> tuple[int, Tensor | None, float]:
    checks.number("gamma", gamma, low=0, high=1)
    mode = checks.one_of("mask_mode", mask_mode, reference.MASK_MODES)
    if bootstrap is not None:
        checks.rows("bootstrap", bootstrap, checks.row_count(like, cu), "sequence", like)
    if isinstance(lam, Tensor):
        checks.rows("lam", lam, checks.row_count(like, cu), "sequence", like)
        return mode, lam.detach().double().contiguous(), 1.0
    checks.number("lam", lam, low=0, high=1)
    return mode, None, float(lam)


def _reference_shaping(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None, cu: Tensor | None, kl_coef: float, kl: str,
    score_clip: float | None, kl_clip: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    value_checks.pack(cu, logprobs)
    one_row = logprobs.dim() == 1 and cu is None
    if one_row:
        logprobs, ref_logprobs = logprobs.unsqueeze(0), ref_logprobs.unsqueeze(0)
        mask = None if mask is None else mask.unsqueeze(0)
    rewards, kls = reference.shape_rewards(
        scores, logprobs, ref_logprobs, mask, kl_coef=kl_coef, kl=kl, score_clip=score_clip, kl_clip=kl_clip, cu_seqlens=cu
    )
    return (rewards[0], kls[0]) if one_row else (rewards, kls)


def _reference_gae(
    rewards: Tensor, values: Tensor, mask: Tensor | None, cu: Tensor | None, gamma: float, lam: float | Tensor,
    mask_mode: str, bootstrap: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    value_checks.unit_interval("lam", lam if isinstance(lam, Tensor) else None)
    value_checks.pack(cu, rewards)
    one_row = rewards.dim() == 1 and cu is None
    if one_row:
        rewards, values = rewards.unsqueeze(0), values.unsqueeze(0)
        mask = None if mask is None else mask.unsqueeze(0)
    a, returns = reference.gae(
        rewards, values, mask, cu_seqlens=cu, gamma=gamma, lam=lam, mask_mode=mask_mode, bootstrap=bootstrap
    )
    return (a[0], returns[0]) if one_row else (a, returns)


def _whitened(a: Tensor, mask: Tensor | None, group: Any, backend: str | None) -> Tensor:
    return masked_whiten(a, None if mask is None else mask != 0, group=group, backend=backend)


def _rollout_implementation(
    like: Tensor, rewards: Tensor | None, scores: Tensor | None, ref_logprobs: Tensor | None, values: Tensor | None,
    mask: Tensor | None, bootstrap: Tensor | None, cu_seqlens: Tensor | None, lams: Tensor | None,
    numbers: list[float], codes: list[int], whiten: bool, backend: str,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """`like`: the rewards where they are given, the logprobs where they are to be shaped."""
    dtype = result_dtype_on("gae", backend, like, ref_logprobs, values, rewards)
    if value_checks.wanted(backend):
        value_checks.pack(cu_seqlens, like)
        value_checks.unit_interval("lam", lams)
    shaping = rewards is None
    valued = values is not None
    shaped, kls, advantages, returns = empties(like, dtype, shaping, shaping, valued or not shaping, valued)
    kl_coef, score_clip, kl_clip, gamma, lam = numbers
    if backend == "triton":
        triton_kernels("gae").rollout(
            rewards, scores, like if shaping else None, ref_logprobs, values, mask, bootstrap, cu_seqlens, lams,
            kl_coef=kl_coef, kl_kind=codes[0], score_clip=score_clip, kl_clip=kl_clip, gamma=gamma, lam=lam, mask_mode=codes[1],
            shaped=shaped, kl=kls, advantages=advantages, returns=returns,
        )  # fmt: skip
    else:
        arguments = (
            tokens(rewards), row_values(scores), tokens(like) if shaping else None, tokens(ref_logprobs), tokens(values),
            tokens(mask), row_values(bootstrap), (kl_coef, codes[0], score_clip, kl_clip), gamma, lam, address(lams), codes[1],
            address(shaped), address(kls), address(advantages), address(returns),
        )  # fmt: skip
        if backend == "cpu":
            extension().rollout(row_shape(like, cu_seqlens), dtype == torch.float64, *arguments, whiten, threads())
        else:
            native(backend).rollout(row_shape(like, cu_seqlens), *arguments, raw_stream(like))
    if whiten and backend != "cpu":
        counted = None if mask is None else mask != 0
        standardize_by(moments(advantages, counted, backend), advantages, counted, True, True, 1e-8, backend, advantages)
    return shaped, kls, advantages, returns


def _fake_rollout(
    like: Tensor, rewards: Tensor | None, scores: Any, ref: Tensor | None, values: Tensor | None, *rest: Any
) -> tuple[Tensor | None, ...]:
    wide = any(t is not None and t.dtype == torch.float64 for t in (like, rewards, ref, values))

    def out(wanted: bool) -> Tensor | None:
        return like.new_empty(like.shape, dtype=torch.float64 if wide else torch.float32) if wanted else None

    shaping = rewards is None
    return out(shaping), out(shaping), out(values is not None or not shaping), out(values is not None)


_rollout = Op(
    "rollout",
    "(Tensor like, Tensor? rewards, Tensor? scores, Tensor? ref_logprobs, Tensor? values, Tensor? mask, "
    "Tensor? bootstrap, Tensor? cu_seqlens, Tensor? lams, float[] numbers, int[] codes, bool whiten, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _rollout_implementation,
    _fake_rollout,
)
