"""Rewards, advantages and returns."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from .native import address, bound, empty, extension, number, one_of, rows, same_shape, tokens, wide
from .softmax import KINDS
from .statistics import boundaries, whiten
from .view import CPU, FLOATS, INTEGERS, MASKS, View, give_back, view

MODES = ("carry", "zero", "none")
GROUPS = ("grpo", "dr_grpo", "rloo", "reinforce++", "opo")


class Experience(NamedTuple):
    """Results of `experience`."""

    rewards: Any
    kl: Any
    advantages: Any
    returns: Any


def _run(
    op: str, like: Any, rewards: View | None, scores: View | None, logprobs: View | None, ref: View | None, values: View | None,
    mask: View | None, bootstrap: View | None, cu: View | None, shaping: tuple[float, int, float, float], gamma: float,
    lam: Any, mode: int, white: bool,
) -> tuple[Any, ...]:  # fmt: skip
    first = rewards if rewards is not None else logprobs
    assert first is not None
    native, lane = extension(op, first, on_gpu=True)
    f64 = wide(rewards, logprobs, ref, values)
    if first.device != CPU and f64:
        raise TypeError(f"{op}: kernels on a GPU compute in float32, got float64")
    lams = None
    if not isinstance(lam, int | float):
        lams = np.ascontiguousarray(np.asarray(lam), dtype=np.float64)
        if first.device != CPU:
            raise ValueError("lam: on a GPU a number is expected")
        if lams.shape != (rows(first, cu)[0],) or not ((lams >= 0) & (lams <= 1)).all():
            raise ValueError(f"lam: expected a number or one for each sequence, in [0, 1], got shape {lams.shape}")
    number("gamma", gamma, 0.0, 1.0)
    out = [
        empty(like, first, first.shape, f64) if wanted else None
        for wanted in (rewards is None, rewards is None, values is not None or rewards is not None, values is not None)
    ]
    arguments = (
        tokens(rewards), tokens(scores, True), tokens(logprobs), tokens(ref), tokens(values), tokens(mask),
        tokens(bootstrap, True), shaping, float(gamma), 1.0 if lams is not None else number("lam", lam, 0.0, 1.0),
        0 if lams is None else address(lams),
        mode,
        *(address(o) for o in out),
    )  # fmt: skip
    shape = rows(first, cu)
    if first.device == CPU:
        native.rollout(shape, f64, *arguments, white, lane)
    else:
        native.rollout(shape, *arguments, lane)
    return tuple(o if o is None else give_back(like, o) for o in out)


NO_SHAPING = (0.0, 0, math.inf, math.inf)


def _like(name: str, x: Any, of: str, first: View, dtypes: tuple[str, ...] = FLOATS) -> View | None:
    v = None if x is None else view(name, x, dtypes)
    same_shape(name, v, of, first)
    return v


def _first(name: str, x: Any, cu_seqlens: Any) -> tuple[View, View | None]:
    v, cu = view(name, x, FLOATS), boundaries(cu_seqlens)
    if len(v.shape) not in ((1,) if cu is not None else (1, 2)):
        raise ValueError(f"{name}: expected (B, T), or (total) with cu_seqlens, got shape {v.shape}")
    return v, cu


def _per_row(name: str, x: Any, first: View, cu: View | None) -> View | None:
    v = None if x is None else view(name, x, FLOATS)
    if v is not None and v.shape != (rows(first, cu)[0],):
        raise ValueError(f"{name}: expected shape ({rows(first, cu)[0]},), one for each sequence, got {v.shape}")
    return v


def gae(
    rewards: Any, values: Any, mask: Any = None, *, cu_seqlens: Any = None, gamma: float = 1.0, lam: Any = 0.95,
    mask_mode: str = "carry", bootstrap: Any = None, whiten: bool = False,
) -> tuple[Any, Any]:  # fmt: skip
    """`fastrlhf.gae`: (advantages, returns)."""
    r, cu = _first("rewards", rewards, cu_seqlens)
    v, m = _like("values", values, "rewards", r), _like("mask", mask, "rewards", r, MASKS)
    if v is None:
        raise TypeError("values: expected an array, got None")
    if whiten and r.device != CPU:
        raise ValueError("whiten: not for arrays in a GPU's memory")
    mode = one_of("mask_mode", mask_mode, MODES)
    boot = _per_row("bootstrap", bootstrap, r, cu)
    out = _run("gae", rewards, r, None, None, None, v, m, boot, cu, NO_SHAPING, gamma, lam, mode, whiten)
    return out[2], out[3]


def discounted_returns(rewards: Any, mask: Any = None, *, cu_seqlens: Any = None, gamma: float = 1.0) -> Any:
    """`fastrlhf.discounted_returns`."""
    r, cu = _first("rewards", rewards, cu_seqlens)
    m = _like("mask", mask, "rewards", r, MASKS)
    return _run("discounted_returns", rewards, r, None, None, None, None, m, None, cu, NO_SHAPING, gamma, 1.0, 0, False)[2]


def shape_rewards(
    scores: Any, logprobs: Any, ref_logprobs: Any, mask: Any = None, *, kl_coef: float, kl: str = "k1",
    score_clip: float | None = None, kl_clip: float | None = None, cu_seqlens: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    """`fastrlhf.shape_rewards`: (rewards, kl)."""
    a, cu = _first("logprobs", logprobs, cu_seqlens)
    b, m = _like("ref_logprobs", ref_logprobs, "logprobs", a), _like("mask", mask, "logprobs", a, MASKS)
    s = _per_row("scores", scores, a, cu)
    shaping = (number("kl_coef", kl_coef), one_of("kl", kl, KINDS), bound("score_clip", score_clip), bound("kl_clip", kl_clip))
    out = _run("shape_rewards", logprobs, None, s, a, b, None, m, None, cu, shaping, 1.0, 1.0, 0, False)
    return out[0], out[1]


def experience(
    scores: Any, logprobs: Any, ref_logprobs: Any, values: Any, mask: Any = None, *, kl_coef: float, kl: str = "k1",
    score_clip: float | None = None, kl_clip: float | None = None, cu_seqlens: Any = None, gamma: float = 1.0, lam: Any = 0.95,
    mask_mode: str = "carry", bootstrap: Any = None, whiten: bool = False,
) -> Experience:  # fmt: skip
    """`fastrlhf.experience`: rewards, KL, advantages and returns in one pass."""
    a, cu = _first("logprobs", logprobs, cu_seqlens)
    if a.device != CPU:
        raise ValueError("experience: arrays in a GPU's memory are not taken by this function; copy them to the CPU")
    b, v = _like("ref_logprobs", ref_logprobs, "logprobs", a), _like("values", values, "logprobs", a)
    m, s = _like("mask", mask, "logprobs", a, MASKS), _per_row("scores", scores, a, cu)
    shaping = (number("kl_coef", kl_coef), one_of("kl", kl, KINDS), bound("score_clip", score_clip), bound("kl_clip", kl_clip))
    boot, mode = _per_row("bootstrap", bootstrap, a, cu), one_of("mask_mode", mask_mode, MODES)
    return Experience(*_run("experience", logprobs, None, s, a, b, v, m, boot, cu, shaping, gamma, lam, mode, whiten))


def group_advantages(
    scores: Any, group_ids: Any, *, kind: str = "grpo", eps: float = 1e-6, unbiased: bool = True, lengths: Any = None
) -> Any:
    """`fastrlhf.group_advantages` of scores (B)."""
    s, ids = view("scores", scores, FLOATS), view("group_ids", group_ids, INTEGERS)
    if len(s.shape) != 1:
        raise ValueError(f"scores: expected shape (B,), got {s.shape}")
    same_shape("group_ids", ids, "scores", s)
    weights = _like("lengths", lengths, "scores", s, MASKS)
    code = one_of("kind", kind, GROUPS)
    if kind == "opo" and weights is None:
        raise ValueError("lengths: needed for kind='opo', got None")
    native, _ = extension("group_advantages", s)
    out = empty(scores, s, s.shape, wide(s))
    native.group_advantages(
        s.shape[0], wide(s), tokens(s, True), tokens(ids, True), tokens(weights, True), code, number("eps", eps, 0.0), unbiased,
        address(out),
    )  # fmt: skip
    done = whiten(out, None, unbiased=unbiased, eps=eps) if kind == "reinforce++" else out
    return give_back(scores, done)
