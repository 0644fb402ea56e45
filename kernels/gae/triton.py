"""Reward shaping and generalised advantages in one launch: one program a row, tiles from the row's end."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..common.launch import launch
from ..common.tiles import tile
from ..common.triton_kl import bounded, kl_clamped
from ..common.triton_tokens import load_mask, load_tokens, plain, row_bounds, row_shape, strides

_INPUTS = ("rewards", "logprobs", "ref", "values", "mask")
_RUNTIME, _COLUMNS = ["length", *(f"s_{x}" for x in _INPUTS)], [*(f"c_{x}" for x in _INPUTS), "s_scores", "s_bootstrap"]


@triton.jit
def _then(p, q, d, e, p2, q2, d2, e2):
    """One run of tokens and the run to its left as one. A run maps X to A = p X + q at its left end and to d X + e, the
    next X; p < 0 says that it has no token that counts, so that A is whatever came from the right."""
    empty = p2 < 0
    return tl.where(empty, p, p2 * d), tl.where(empty, q, tl.fma(p2, e, q2)), d2 * d, tl.fma(d2, e, e2)


@triton.jit
def _load(
    rewards, logprobs, ref_logprobs, values, mask, row, at, lane, inside,
    s_rewards, c_rewards, s_logprobs, c_logprobs, s_ref, c_ref, s_values, c_values, s_mask, c_mask,
):  # fmt: skip
    """Rewards, or what they are shaped from; values; the mask. Zeros where absent."""
    absent = tl.zeros(lane.shape, tl.float32)
    if rewards is None:
        x = load_tokens(logprobs, row, at, s_logprobs, c_logprobs, lane, inside)
        y = load_tokens(ref_logprobs, row, at, s_ref, c_ref, lane, inside)
    else:
        x = load_tokens(rewards, row, at, s_rewards, c_rewards, lane, inside)
        y = absent
    if values is None:
        v = absent
    else:
        v = load_tokens(values, row, at, s_values, c_values, lane, inside)
    return x, y, v, load_mask(mask, row, at, s_mask, c_mask, lane, inside)


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_COLUMNS)
def rollout_kernel(
    rewards, scores, logprobs, ref_logprobs, values, mask, bootstrap, cu_seqlens, lams,
    shaped, kl, advantages, returns, length,
    s_rewards, c_rewards, s_logprobs, c_logprobs, s_ref, c_ref, s_values, c_values, s_mask, c_mask, s_scores, s_bootstrap,
    minus_kl_coef, score_clip, kl_clip, gamma, lam, one_minus_lam, gamma_lam,
    KL_KIND: tl.constexpr, MASK_MODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With X_t = V_t + lam A_t, the value after the last token at first: A_t = r_t - V_t + gamma X_{t+1}, so that
    X_t = (1 - lam) V_t + lam r_t + gamma lam X_{t+1}, an associative scan. Over a token that is carried, X and A pass.

    Tokens are indexed from the row's end: a scan to the left is then a plain one, and a row has the same tiles and bits
    however it is laid out."""
    row = tl.program_id(0).to(tl.int64)
    start, size = row_bounds(row, cu_seqlens, length)
    start += size - 1  # the last token
    out = start + row * length
    i = tl.arange(0, BLOCK)
    if lams is not None:
        exact_lam = tl.load(lams + row)
        lam = exact_lam.to(tl.float32)
        one_minus_lam = (1.0 - exact_lam).to(tl.float32)
        gamma_lam = (exact_lam * gamma).to(tl.float32)
    if bootstrap is None:
        carried_x = tl.full([], 0.0, tl.float32)
    else:
        carried_x = tl.load(bootstrap + row * s_bootstrap).to(tl.float32)
    carried_a = tl.full([], 0.0, tl.float32)
    if rewards is None:
        score = bounded(tl.load(scores + row * s_scores).to(tl.float32), score_clip)
        score_given = size * 0
    x, y, v, m = _load(
        rewards, logprobs, ref_logprobs, values, mask, row, start, -i, i < size,
        s_rewards, c_rewards, s_logprobs, c_logprobs, s_ref, c_ref, s_values, c_values, s_mask, c_mask,
    )  # fmt: skip
    for first in range(0, size, BLOCK):
        next_x, next_y, next_v, next_m = _load(  # in flight while this tile is scanned
            rewards, logprobs, ref_logprobs, values, mask, row, start - first - BLOCK, -i, i < size - first - BLOCK,
            s_rewards, c_rewards, s_logprobs, c_logprobs, s_ref, c_ref, s_values, c_values, s_mask, c_mask,
        )  # fmt: skip
        inside, counted = i < size - first, m != 0
        to = out - first - i
        if rewards is None:
            value, _ = kl_clamped(x - y, float("inf"), kl_clip, KL_KIND, False)
            value = tl.where(counted, value, 0.0)
            r = minus_kl_coef * value
            if score_given == 0:
                last = tl.min(tl.where(counted, i, BLOCK), 0)
                r += tl.where(i == last, score, 0.0)
                score_given = (last < BLOCK).to(tl.int32)
            if shaped is not None:
                tl.store(shaped + to, r, mask=inside)
            if kl is not None:
                tl.store(kl + to, value, mask=inside)
        else:
            r = x
        if advantages is not None:
            if MASK_MODE == 1:
                r, v = tl.where(counted, m * r, 0.0), tl.where(counted, m * v, 0.0)
            p = tl.zeros([BLOCK], tl.float32) + gamma
            q = r - v
            d = tl.zeros([BLOCK], tl.float32) + gamma_lam
            e = tl.fma(tl.zeros([BLOCK], tl.float32) + lam, r, one_minus_lam * v)
            if MASK_MODE == 0:
                p, q = tl.where(counted, p, -1.0), tl.where(counted, q, 0.0)
                d, e = tl.where(counted, d, 1.0), tl.where(counted, e, 0.0)
            p, q, d, e = tl.associative_scan((p, q, d, e), 0, _then)
            a = tl.where(p < 0, carried_a, tl.fma(p, carried_x, q))
            tl.store(advantages + to, a, mask=inside)
            if returns is not None:
                tl.store(returns + to, a + v, mask=inside)
            carried_a = tl.sum(tl.where(i == BLOCK - 1, a, 0.0), 0)
            carried_x = tl.sum(tl.where(i == BLOCK - 1, tl.fma(d, carried_x, e), 0.0), 0)
        x, y, v, m = next_x, next_y, next_v, next_m


def rollout(
    rewards: torch.Tensor | None,
    scores: torch.Tensor | None,
    logprobs: torch.Tensor | None,
    ref_logprobs: torch.Tensor | None,
    values: torch.Tensor | None,
    mask: torch.Tensor | None,
    bootstrap: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    lams: torch.Tensor | None,
    *,
    kl_coef: float,
    kl_kind: int,
    score_clip: float | None,
    kl_clip: float | None,
    gamma: float,
    lam: float,
    mask_mode: int,
    shaped: torch.Tensor | None,
    kl: torch.Tensor | None,
    advantages: torch.Tensor | None,
    returns: torch.Tensor | None,
) -> None:
    """Rewards, or scores, logprobs and ref_logprobs to shape them from, to whichever outputs are given."""
    like = rewards if rewards is not None else logprobs
    assert like is not None
    rows, length = row_shape(like, cu_seqlens)
    launch(
        rollout_kernel, (rows if like.numel() else 0,),
        rewards, scores, logprobs, ref_logprobs, values, plain(mask), bootstrap, cu_seqlens, lams,
        shaped, kl, advantages, returns, length,
        *strides(rewards), *strides(logprobs), *strides(ref_logprobs), *strides(values), *strides(mask),
        strides(scores)[1], strides(bootstrap)[1],
        -float(kl_coef), math.inf if score_clip is None else float(score_clip), math.inf if kl_clip is None else float(kl_clip),
        float(gamma), float(lam), 1.0 - lam, float(gamma * lam),
        KL_KIND=kl_kind, MASK_MODE=2 if mask is None else mask_mode,
        enable_fp_fusion=False,  # rewards shaped here and rewards read back are to be the same bits
        **tile("gae.rollout", like, length),
    )  # fmt: skip
