"""The policy-gradient losses: loss, gradient and statistics in one pass."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.kl.reference import KINDS as KL_KINDS
from ..kernels.policy_loss import reference
from ..kernels.policy_loss.reference import RolloutCorrection
from . import checks, value_checks
from .backend import (
    address,
    choose,
    counter,
    cuda_extension,
    empty_as,
    empty_scalar,
    empty_stats,
    extension,
    raw_stream,
    result_dtype_on,
    row_shape,
    row_values,
    threads,
    tokens,
    triton_kernels,
    workspace,
)
from .library import Op, present
from .reduction import device_denominator, global_denominator, loss_gradient, read_denominator, triton_denominator
from .stats import LossStats

_NAMES = {"gpg": "reinforce"}


class PolicyLoss(NamedTuple):
    """`loss` 0-dim, differentiable; `stats` a `LossStats`."""

    loss: Tensor
    stats: LossStats


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    kind: str = "ppo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio_clamp: float | None = None,
    delta: float | None = None,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    rollout_logprobs: Tensor | None = None,
    rollout_correction: RolloutCorrection | str | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    reduction: str = "token-mean",
    denominator: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    group: Any = None,
    backend: str | None = None,
) -> PolicyLoss:
    """Clipped policy-gradient losses, with their gradient and statistics in the same pass.

    With r = exp(clamp(logprobs - old_logprobs, ±ratio_clamp)) and A the advantage, a token's loss is

    - ``ppo``: max(-A r, -A clip(r, 1-clip_low, 1+clip_high)); with `delta`, r is bounded above by it in the first term;
      with `dual_clip` c, for A < 0, min(that, -A c). DAPO is clip_high=0.28; GRPO is ppo on `group_advantages`.
    - ``reinforce`` (``gpg``): -A logprobs.
    - ``cispo``: -A sg(clip(r)) logprobs.
    - ``sapo``: -A σ(τ (r - 1)) 4/τ, τ = tau_pos for A > 0, else tau_neg.
    - ``gspo``: ppo with r = exp(mean over the sequence of the log-ratio); the gradient flows through the mean.
    - ``gmpo``: -Ā exp(mean over the sequence of the log-ratio clipped to [-clip_low, clip_high] on the side that A's sign
      names), Ā the sequence's mean advantage.

    times the rollout correction's weight, + kl_coef · `kl`(logprobs, ref_logprobs) - entropy_coef · entropy. Then, with
    weights m and n_b = Σ_t m_bt (sequences without a counted token do not count):

    - ``token-mean``: Σ m l / Σ m;  ``token-sum``: Σ m l;
    - ``seq-mean-token-mean``: mean over sequences of Σ_t m l / n_b;  ``seq-mean-token-sum``: of Σ_t m l;
    - ``seq-mean-token-sum-norm``: the latter over T (Dr.GRPO).

    Args:
        logprobs: (B, T), packed (total) with `cu_seqlens`, or (T) as one sequence; floating.
        old_logprobs: the same shape; the policy that the rollout's gradient is taken from.
        advantages: the same shape, or (B).
        mask: the same shape, bool or weights; None counts all. What is masked may hold anything.
        clip_low, clip_high: >= 0.  dual_clip: > 1, or None.  ratio_clamp, delta, tau_pos, tau_neg: > 0.
        rollout_logprobs: the same shape, from the inference engine.
        rollout_correction: a `RolloutCorrection`, or its kind as a string; needs rollout_logprobs.
        ref_logprobs, entropy: the same shape. Gradients flow to logprobs and entropy only.
        denominator: what the reduction divides by in place of its own count (tokens; sequences; sequences · T): give the
            global count, and micro-batches and data-parallel ranks add up to the exact full-batch loss.
        group: a process group over which the count is summed instead.
        backend: "cuda", "triton", "cpu" or "reference"; None chooses.

    Returns:
        `PolicyLoss(loss, stats)`: loss 0-dim float32 (float64 for float64 logprobs), 0 with gradient 0 where nothing is
        counted. stats, weighted means over counted tokens of this call: clip_fraction_low, clip_fraction_high (the
        clipped term chosen at A < 0, A > 0; for cispo, r outside), dual_clip_fraction, ratio_mean/min/max,
        approx_kl_k1 and _k3 of old against new, ref_kl, entropy, tokens (their number), rollout_mismatch_mean and _max of
        |old - rollout|, rollout_weight_mean, rollout_corrected_fraction. nats.

    Raises:
        TypeError, ValueError: dtype, shape or device that do not fit, an unknown kind or reduction, an option outside its
        range, cu_seqlens that fall or do not end at the number of tokens.

    Source: ppo Schulman et al. 2017; dual clip Ye et al. 2020; two-sided delta INTELLECT-2 2025; cispo MiniMax-M1 2025;
    sapo and gspo Qwen 2025; gmpo Zhao et al. 2025; Dr.GRPO Liu et al. 2025.
    """
    cu, kind, correction, codes, numbers, denominator = settings(
        logprobs, old_logprobs, advantages, mask, kind, clip_low, clip_high, dual_clip, ratio_clamp, delta, tau_pos, tau_neg,
        rollout_logprobs, rollout_correction, ref_logprobs, kl_coef, kl, entropy, entropy_coef, reduction, denominator,
        cu_seqlens, group,
    )  # fmt: skip
    backend = choose("policy_loss", logprobs, backend)
    if backend == "reference":
        loss, stats = _reference(
            logprobs, old_logprobs, advantages, mask, cu, rollout_logprobs, ref_logprobs, entropy, kind=kind,
            clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, ratio_clamp=ratio_clamp, delta=delta,
            tau_pos=tau_pos, tau_neg=tau_neg, rollout_correction=correction, kl_coef=kl_coef, kl=kl,
            entropy_coef=entropy_coef, reduction=reduction, denominator=denominator,
        )  # fmt: skip
        return PolicyLoss(loss, LossStats(stats, reference.STATS))
    grads = torch.is_grad_enabled()
    given = denominator if isinstance(denominator, Tensor) else None
    number = math.nan if denominator is None or given is not None else float(denominator)
    loss, stats, *_ = _policy_loss(
        logprobs, old_logprobs, advantages, mask, rollout_logprobs, ref_logprobs, entropy, cu, given, numbers, number, codes,
        grads and logprobs.requires_grad, grads and entropy is not None and entropy.requires_grad, backend,
    )  # fmt: skip
    return PolicyLoss(loss, LossStats(stats.detach() if stats.requires_grad else stats, reference.STATS))


class Settings(NamedTuple):
    """What the arguments of a policy loss come to, checked."""

    cu_seqlens: Tensor | None
    kind: str
    correction: RolloutCorrection | None
    codes: list[int]
    numbers: list[float]
    denominator: float | Tensor | None


def settings(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor | None, kind: str, clip_low: float,
    clip_high: float, dual_clip: float | None, ratio_clamp: float | None, delta: float | None, tau_pos: float, tau_neg: float,
    rollout_logprobs: Tensor | None, rollout_correction: RolloutCorrection | str | None, ref_logprobs: Tensor | None,
    kl_coef: float, kl: str, entropy: Tensor | None, entropy_coef: float, reduction: str,
    denominator: float | Tensor | None, cu_seqlens: Tensor | None, group: Any,
) -> Settings:  # fmt: skip
    cu = checks.token_matrix("logprobs", logprobs, cu_seqlens)
    checks.like("old_logprobs", old_logprobs, "logprobs", logprobs)
    checks.tensor("advantages", advantages)
    if advantages.shape != logprobs.shape:
        count = checks.row_count(logprobs, cu)
        if advantages.shape != (count,) or (logprobs.dim() == 1 and cu is None):
            raise ValueError(
                f"advantages: expected the shape of logprobs, {checks.shape_of(logprobs)}, or ({count},), got "
                f"{checks.shape_of(advantages)}"
            )
    checks.same_device("advantages", advantages, "logprobs", logprobs)
    if mask is not None:
        checks.like("mask", mask, "logprobs", logprobs, checks.MASKS)
    if rollout_logprobs is not None:
        checks.like("rollout_logprobs", rollout_logprobs, "logprobs", logprobs)
    if ref_logprobs is not None:
        checks.like("ref_logprobs", ref_logprobs, "logprobs", logprobs)
    if entropy is not None:
        checks.like("entropy", entropy, "logprobs", logprobs)
    kind = _NAMES.get(kind, kind)
    codes = [
        checks.one_of("kind", kind, reference.KINDS), 0, 0, checks.one_of("kl", kl, KL_KINDS),
        checks.one_of("reduction", reduction, reference.REDUCTIONS),
    ]  # fmt: skip
    if clip_low != 0.2 or clip_high != 0.2:
        checks.number("clip_low", clip_low, low=0)
        checks.number("clip_high", clip_high, low=0)
    if dual_clip is not None:
        checks.number("dual_clip", dual_clip, low=1, open_low=True)
    checks.positive_or_none("ratio_clamp", ratio_clamp)
    checks.positive_or_none("delta", delta)
    if kind == "sapo":
        checks.number("tau_pos", tau_pos, low=0, open_low=True)
        checks.number("tau_neg", tau_neg, low=0, open_low=True)
    correction = RolloutCorrection(rollout_correction) if isinstance(rollout_correction, str) else rollout_correction
    if correction is not None:
        if rollout_logprobs is None:
            raise ValueError("rollout_logprobs: needed for rollout_correction, got None")
        codes[1] = reference.CORRECTIONS.index(correction.kind)
        codes[2] = reference.LEVELS.index(correction.level)
    if kl_coef != 0:
        checks.number("kl_coef", kl_coef)
        if ref_logprobs is None:
            raise ValueError(f"ref_logprobs: needed for kl_coef={kl_coef}, got None")
    if entropy_coef != 0:
        checks.number("entropy_coef", entropy_coef)
        if entropy is None:
            raise ValueError(f"entropy: needed for entropy_coef={entropy_coef}, got None")
    denominator = global_denominator(denominator, logprobs, mask, cu, reduction, group)
    low, high = (correction.low, correction.high) if correction is not None else (0.0, 0.0)
    numbers = [
        float(clip_low), float(clip_high), dual_clip or math.inf, ratio_clamp or math.inf, delta or math.inf, tau_pos,
        tau_neg, low, high, float(kl_coef), float(entropy_coef),
    ]  # fmt: skip
    return Settings(cu, kind, correction, codes, numbers, denominator)


def _reference(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor | None, cu: Tensor | None,
    rollout_logprobs: Tensor | None, ref_logprobs: Tensor | None, entropy: Tensor | None, **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    value_checks.pack(cu, logprobs)

    def row(t: Tensor | None) -> Any:
        return t.unsqueeze(0) if t is not None and t.dim() == 1 and cu is None and logprobs.dim() == 1 else t

    def constant(t: Tensor | None) -> Any:
        return None if t is None else row(t.detach())

    return reference.policy_loss(
        row(logprobs), constant(old_logprobs), constant(advantages), constant(mask), cu_seqlens=cu,
        rollout_logprobs=constant(rollout_logprobs), ref_logprobs=constant(ref_logprobs), entropy=row(entropy), **options,
    )  # fmt: skip


def _forward(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor | None, rollout_logprobs: Tensor | None,
    ref_logprobs: Tensor | None, entropy: Tensor | None, cu_seqlens: Tensor | None, given: Tensor | None,
    numbers: list[float], denominator: float, codes: list[int], grad: bool, grad_entropy: bool,
    backend: str,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    dtype = result_dtype_on("policy_loss", backend, logprobs, old_logprobs, advantages)
    shape = row_shape(logprobs, cu_seqlens)
    loss, stats = empty_scalar(dtype, logprobs), empty_stats(reference.STATS, logprobs)
    d_logprobs = empty_as(logprobs, dtype) if grad else None
    d_entropy = empty_as(logprobs, dtype) if grad_entropy else None
    if backend != "cpu" and value_checks.wanted(backend):
        value_checks.pack(cu_seqlens, logprobs)
    if backend == "triton":
        share = empty_scalar(torch.float32, logprobs)
        triton_kernels("policy_loss").policy_loss(
            logprobs, old_logprobs, advantages, mask, rollout_logprobs, ref_logprobs, entropy, cu_seqlens,
            triton_denominator(denominator, given), numbers=numbers, codes=codes, grad_logprobs=d_logprobs,
            grad_entropy=d_entropy, loss=loss, stats=stats, share=share, counter=counter(logprobs),
        )  # fmt: skip
        return loss, stats, d_logprobs, d_entropy, share
    per_row = advantages.shape != logprobs.shape
    arrays = (
        tokens(logprobs), tokens(old_logprobs), row_values(advantages) if per_row else tokens(advantages), tokens(mask),
        tokens(rollout_logprobs), tokens(ref_logprobs), tokens(entropy),
    )  # fmt: skip
    grads = (address(d_logprobs), address(d_entropy))
    if backend == "cpu":
        extension().policy_loss(
            shape, dtype == torch.float64, arrays, (*numbers, denominator if given is None else read_denominator(given)),
            tuple(codes), *grads, loss.data_ptr(), stats.data_ptr(), threads(),
        )  # fmt: skip
        return loss, stats, d_logprobs, d_entropy, None
    share, over = empty_scalar(torch.float32, logprobs), device_denominator(given)
    work, ticket = workspace(shape, logprobs), counter(logprobs)
    cuda_extension().policy_loss(
        shape, arrays, (*numbers, denominator), tuple(codes), *grads, loss.data_ptr(), stats.data_ptr(), share.data_ptr(),
        address(over), work.data_ptr(), work.numel(), ticket.data_ptr(), raw_stream(logprobs),
    )  # fmt: skip
    return loss, stats, d_logprobs, d_entropy, share


def _fake(logprobs: Tensor, old: Tensor, advantages: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    grad, grad_entropy, backend = rest[-3:]
    dtype = torch.float64 if torch.float64 in (logprobs.dtype, old.dtype, advantages.dtype) else torch.float32
    return (
        logprobs.new_empty((), dtype=dtype),
        logprobs.new_empty(len(reference.STATS), dtype=torch.float32),
        logprobs.new_empty(logprobs.shape, dtype=dtype) if grad else None,
        logprobs.new_empty(logprobs.shape, dtype=dtype) if grad_entropy else None,
        None if backend == "cpu" else logprobs.new_empty((), dtype=torch.float32),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    ctx.save_for_backward(*(present(t) for t in output[2:]))
    ctx.dtypes, ctx.backend = (inputs[0].dtype, None if inputs[6] is None else inputs[6].dtype), inputs[-1]


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    d_logprobs, d_entropy, share = ctx.saved_tensors
    first = loss_gradient(d_logprobs, grad, share, ctx.dtypes[0], ctx.backend)
    second = loss_gradient(d_entropy, grad, share, ctx.dtypes[1], ctx.backend)
    return first, None, None, None, None, None, second, *[None] * 8


_policy_loss = Op(
    "policy_loss",
    "(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor? mask, Tensor? rollout_logprobs, "
    "Tensor? ref_logprobs, Tensor? entropy, Tensor? cu_seqlens, Tensor? given, float[] numbers, float denominator, "
    "int[] codes, bool grad, bool grad_entropy, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    _setup,
    _backward,
)
