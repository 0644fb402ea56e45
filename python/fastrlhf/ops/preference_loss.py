"""Losses on pairs of sequences and on scalar predictions, and the sequence log-probs under them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.preference_loss import reference
from . import checks
from .backend import (
    address,
    choose,
    empties,
    empty_scalar,
    empty_stats,
    extension,
    result_dtype_on,
    row_values,
    triton_kernels,
)
from .library import Op, present
from .reduction import divided, given_denominator, read_denominator, triton_denominator
from .stats import LossStats

_NAMES = {"cdpo": "dpo", "spin": "dpo"}
_STATS = ("accuracy", "margin", "chosen_reward", "rejected_reward", "sft_loss")
_OPTIONS = ("reward_scale", "margin", "desirable_weight", "undesirable_weight", "sft_coef")
_REWARD_STATS = ("accuracy", "margin", "chosen_mean", "rejected_mean")


class PreferenceLoss(NamedTuple):
    """`loss` 0-dim, differentiable; `losses` (B), one a pair, differentiable; `stats` a `LossStats`."""

    loss: Tensor
    losses: Tensor
    stats: LossStats


def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    *,
    kind: str,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    chosen_rewards: Tensor | None = None,
    rejected_rewards: Tensor | None = None,
    reward_scale: float = 1.0,
    margin: float = 0.0,
    kl_baseline: float | Tensor = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    sft_coef: float = 0.0,
    chosen_lengths: Tensor | None = None,
    denominator: float | Tensor | None = None,
    backend: str | None = None,
) -> PreferenceLoss:
    """Losses on preference pairs, from sequence log-probs.

    With c = chosen - ref_chosen, r = rejected - ref_rejected (without the ref where it is None), x = beta (c - r),
    e = label_smoothing, g = reward_scale (chosen_rewards - rejected_rewards):

    - ``dpo`` (``spin``: rejected is the previous policy's answer): -(1-e) log σ(x) - e log σ(-x); ``cdpo`` is its name
      with e > 0;
    - ``robust``: (-(1-e) log σ(x) + e log σ(-x)) / (1 - 2e);
    - ``ipo``: (c - r - 1/(2 beta))²;  ``hinge``: max(0, 1 - x);  ``rpo_sq``: (x - g)²;
    - ``rpo_fwd_kl``: KL(Bern(σ(x)) || Bern(σ(g)));  ``rpo_bwd_kl``: KL(Bern(σ(g)) || Bern(σ(x)));
    - ``simpo``: dpo's of x - margin, of length-averaged log-probs, without reference;
    - ``orpo``: -beta log σ(log-odds(c) - log-odds(r)), of length-averaged log-probs < 0, without reference;
    - ``kto``: half of desirable_weight (1 - σ(beta (c - z))) + undesirable_weight (1 - σ(beta (z - r))), z = kl_baseline.

    loss = mean of losses + sft_coef · mean of -chosen / chosen_lengths (-chosen where there are no lengths).

    Args:
        chosen, rejected, ref_chosen, ref_rejected: (B), floating, see `sequence_logprobs`. The gradient flows to chosen
            and rejected.
        beta: > 0.  label_smoothing: in [0, 0.5).
        chosen_rewards, rejected_rewards: (B), for the rpo kinds.
        kl_baseline: a number or one-element tensor, >= 0 and without gradient, for kto.
        chosen_lengths: (B), tokens, > 0.
        denominator: what the means divide by instead of B: the pairs of the whole batch.
        backend: "triton", "cpu" or "reference"; None chooses.

    Returns:
        `PreferenceLoss(loss, losses, stats)`, float32 (float64 for float64 chosen); 0 for no pairs. stats: accuracy
        (c > r), margin beta (c - r), chosen_reward beta c, rejected_reward beta r, sft_loss, means.

    Raises:
        TypeError, ValueError: dtype, shape or device that do not fit, an unknown kind, an option outside its range, a
        reference or rewards that the kind needs or must not have.

    Source: dpo Rafailov et al. 2023; cdpo Mitchell 2023; robust Chowdhury et al. 2024; ipo Azar et al. 2024; hinge Zhao
    et al. 2023; rpo NVIDIA Nemotron-4 2024; simpo Meng et al. 2024; orpo Hong et al. 2024; kto Ethayarajh et al. 2024;
    spin Chen et al. 2024.
    """
    checks.tensor("chosen", chosen)
    if chosen.dim() != 1:
        raise ValueError(f"chosen: expected shape (B,), got {checks.shape_of(chosen)}")
    pairs = chosen.shape[0]
    checks.like("rejected", rejected, "chosen", chosen)
    if ref_chosen is not None:
        checks.like("ref_chosen", ref_chosen, "chosen", chosen)
    if ref_rejected is not None:
        checks.like("ref_rejected", ref_rejected, "chosen", chosen)
    if chosen_rewards is not None:
        checks.like("chosen_rewards", chosen_rewards, "chosen", chosen)
    if rejected_rewards is not None:
        checks.like("rejected_rewards", rejected_rewards, "chosen", chosen)
    if chosen_lengths is not None:
        checks.rows("chosen_lengths", chosen_lengths, pairs, "pair", chosen, checks.MASKS)
    if kind == "cdpo" and not label_smoothing:
        raise ValueError("label_smoothing: must be > 0 for kind='cdpo', got 0")
    kind = _NAMES.get(kind, kind)
    code = checks.one_of("kind", kind, reference.KINDS)
    checks.number("beta", beta, low=0, open_low=True)
    if label_smoothing != 0:
        checks.number("label_smoothing", label_smoothing, low=0, high=0.5)
        if label_smoothing == 0.5:
            raise ValueError("label_smoothing: expected in [0, 0.5), got 0.5")
    options = (reward_scale, margin, desirable_weight, undesirable_weight, sft_coef)
    if options != (1.0, 0.0, 1.0, 1.0, 0.0):
        for name, value in zip(_OPTIONS, options, strict=True):
            checks.number(name, value)
    if (ref_chosen is None) != (ref_rejected is None):
        raise ValueError("ref_chosen, ref_rejected: give both or neither")
    if kind in ("simpo", "orpo"):
        if ref_chosen is not None:
            raise ValueError(f"ref_chosen: kind '{kind}' has no reference, got a tensor")
    elif ref_chosen is None:
        raise ValueError(f"ref_chosen: kind '{kind}' needs the reference's log-probs, got None")
    if kind.startswith("rpo") and (chosen_rewards is None or rejected_rewards is None):
        raise ValueError(f"chosen_rewards, rejected_rewards: kind '{kind}' needs both")
    if isinstance(kl_baseline, Tensor):
        kl_baseline = kl_baseline.detach()
    elif kl_baseline != 0:
        checks.number("kl_baseline", kl_baseline, low=0)

    over = given_denominator(denominator, chosen, math.nan)  # NaN: the number of pairs
    backend = choose("preference_loss", chosen, backend)
    if backend == "reference":
        names = ("ref_chosen", "ref_rejected", "chosen_rewards", "rejected_rewards")
        optional = (ref_chosen, ref_rejected, chosen_rewards, rejected_rewards)
        constants = {name: None if t is None else t.detach() for name, t in zip(names, optional, strict=True)}
        losses = reference.preference_losses(
            chosen, rejected, kind=kind, beta=beta, label_smoothing=label_smoothing, reward_scale=reward_scale,
            margin=margin, kl_baseline=kl_baseline, desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight, **constants,
        )  # fmt: skip
        over = max(pairs, 1) if denominator is None else over
        loss, nll = divided(losses.sum(), over), torch.zeros_like(losses.sum())
        if sft_coef:
            nll = divided(-(chosen.to(losses.dtype) / (1 if chosen_lengths is None else chosen_lengths)).sum(), over)
            loss = loss + sft_coef * nll
        c, r = chosen.detach().to(losses.dtype), rejected.detach().to(losses.dtype)
        if ref_chosen is not None and ref_rejected is not None:
            c, r = c - ref_chosen.detach(), r - ref_rejected.detach()
        values = torch.cat([_pair_statistics(c, r, beta), nll.detach().reshape(1)])
        return PreferenceLoss(loss, losses, LossStats(values.float(), _STATS))
    baseline = kl_baseline if isinstance(kl_baseline, Tensor) else None
    numbers = [
        float(beta), float(label_smoothing), float(reward_scale), float(margin),
        0.0 if baseline is not None else float(kl_baseline),
        float(desirable_weight), float(undesirable_weight), float(sft_coef),
    ]  # fmt: skip
    loss, losses, stats = _run(
        chosen, rejected, ref_chosen, ref_rejected, chosen_rewards, rejected_rewards, chosen_lengths, baseline, over,
        code, numbers, backend,
    )  # fmt: skip
    return PreferenceLoss(loss, losses, LossStats(stats, _STATS))


def _pair_statistics(c: Tensor, r: Tensor, scale: float) -> Tensor:
    n = max(c.shape[0], 1)
    return torch.stack([(c > r).sum() / n, scale * (c - r).sum() / n, scale * c.sum() / n, scale * r.sum() / n])


def _run(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor | None, ref_rejected: Tensor | None, chosen_rewards: Tensor | None,
    rejected_rewards: Tensor | None, chosen_lengths: Tensor | None, baseline: Tensor | None, over: float | Tensor, kind: int,
    numbers: list[float], backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    given, number = (over, math.nan) if isinstance(over, Tensor) else (None, over)
    grad = torch.is_grad_enabled() and (chosen.requires_grad or rejected.requires_grad)
    loss, losses, stats, *_ = _preference_loss(
        chosen, rejected, ref_chosen, ref_rejected, chosen_rewards, rejected_rewards, chosen_lengths, baseline, given, kind,
        numbers, number, grad, backend,
    )  # fmt: skip
    if chosen.shape[0] == 0:  # an absent result and an empty one look alike
        losses = chosen.to(loss.dtype)
    return loss, losses, stats.detach() if stats.requires_grad else stats


def _forward(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor | None, ref_rejected: Tensor | None, chosen_rewards: Tensor | None,
    rejected_rewards: Tensor | None, chosen_lengths: Tensor | None, baseline: Tensor | None, given: Tensor | None, kind: int,
    numbers: list[float], denominator: float, grad: bool, backend: str,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    dtype = result_dtype_on("preference_loss", backend, chosen, rejected)
    loss, stats = empty_scalar(dtype, chosen), empty_stats(_stats_of(kind), chosen)
    losses, d_chosen, d_rejected, mean_d_chosen, mean_d_rejected = empties(chosen, dtype, True, grad, grad, grad, grad)
    results = (loss, losses, d_chosen, d_rejected, mean_d_chosen, mean_d_rejected, stats)
    if backend == "triton":
        names = ("loss", "losses", "d_chosen", "d_rejected", "mean_d_chosen", "mean_d_rejected", "stats")
        triton_kernels("preference_loss").preference_loss(
            chosen, rejected, ref_chosen, ref_rejected, chosen_rewards, rejected_rewards, chosen_lengths, baseline,
            triton_denominator(denominator, given), kind=kind, numbers=numbers, **dict(zip(names, results, strict=True)),
        )  # fmt: skip
        return loss, losses, stats, d_chosen, d_rejected, mean_d_chosen, mean_d_rejected
    if baseline is not None:
        numbers = [*numbers[:4], float(baseline.item()), *numbers[5:]]
    extension().preference_loss(
        chosen.shape[0], dtype == torch.float64, kind,
        (row_values(chosen), row_values(rejected), row_values(ref_chosen), row_values(ref_rejected),
         row_values(chosen_rewards), row_values(rejected_rewards), row_values(chosen_lengths)),
        (*numbers, denominator if given is None else read_denominator(given)),
        tuple(address(t) for t in results),
    )  # fmt: skip
    return loss, losses, stats, d_chosen, d_rejected, mean_d_chosen, mean_d_rejected


def _stats_of(kind: int) -> tuple[str, ...]:
    return _STATS if kind < len(reference.KINDS) else _REWARD_STATS


def _fake(chosen: Tensor, rejected: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    dtype = torch.float64 if torch.float64 in (chosen.dtype, rejected.dtype) else torch.float32
    slopes = [chosen.new_empty(chosen.shape, dtype=dtype) if rest[-2] else None for _ in range(4)]
    stats = chosen.new_empty(len(_stats_of(rest[-5])), dtype=torch.float32)
    return chosen.new_empty((), dtype=dtype), chosen.new_empty(chosen.shape, dtype=dtype), stats, *slopes


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    ctx.save_for_backward(*(present(t) for t in output[3:]))
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype


def _backward(ctx: Any, g_loss: Tensor, g_losses: Tensor, *_: Any) -> tuple[Any, ...]:
    d_chosen, d_rejected, mean_d_chosen, mean_d_rejected = ctx.saved_tensors
    if d_chosen is None:
        return None, None, *[None] * 12
    chosen = g_loss * mean_d_chosen + g_losses * d_chosen
    rejected = g_loss * mean_d_rejected + g_losses * d_rejected
    return chosen.to(ctx.dtypes[0]), rejected.to(ctx.dtypes[1]), *[None] * 12


_preference_loss = Op(
    "preference_loss",
    "(Tensor chosen, Tensor rejected, Tensor? ref_chosen, Tensor? ref_rejected, Tensor? chosen_rewards, "
    "Tensor? rejected_rewards, Tensor? chosen_lengths, Tensor? baseline, Tensor? given, int kind, float[] numbers, "
    "float denominator, bool grad, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    _setup,
    _backward,
)


def reward_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    *,
    kind: str = "bt",
    denominator: float | Tensor | None = None,
    backend: str | None = None,
) -> PreferenceLoss:
    """Bradley-Terry losses of a reward model on preference pairs, with x = chosen - rejected:

    ``bt`` -log σ(x); ``margin_bt`` -log σ(x - margin); ``scaled_bt`` -margin log σ(x). loss is their mean.

    Args:
        chosen, rejected: (B) scores, floating; the gradient flows to both.
        margin: (B), how much better the chosen one is; for margin_bt and scaled_bt, and only for them.
        denominator: what the mean divides by instead of B: the pairs of the whole batch.
        backend: "triton", "cpu" or "reference"; None chooses.

    Returns:
        `PreferenceLoss(loss, losses, stats)`; stats: accuracy (x > 0), margin (mean of x), chosen_mean, rejected_mean.

    Raises:
        TypeError, ValueError: dtype, shape or device that do not fit, an unknown kind, a margin missing or not wanted.

    Source: Bradley & Terry 1952; margin Touvron et al. 2023 (Llama 2); scaled Wang et al. 2024 (HelpSteer2-Preference).
    """
    checks.tensor("chosen", chosen)
    if chosen.dim() != 1:
        raise ValueError(f"chosen: expected shape (B,), got {checks.shape_of(chosen)}")
    checks.rows("rejected", rejected, chosen.shape[0], "pair", chosen)
    checks.one_of("kind", kind, reference.REWARD_KINDS)
    if (margin is None) != (kind == "bt"):
        raise ValueError(f"margin: kind '{kind}' {'has none' if kind == 'bt' else 'needs one'}, got {type(margin).__name__}")
    if margin is not None:
        checks.rows("margin", margin, chosen.shape[0], "pair", chosen)
    over = given_denominator(denominator, chosen, math.nan)
    backend = choose("reward_loss", chosen, backend)
    if backend == "reference":
        losses = reference.reward_losses(chosen, rejected, None if margin is None else margin.detach(), kind=kind)
        loss = divided(losses.sum(), max(chosen.shape[0], 1) if denominator is None else over)
        c, r = chosen.detach().to(losses.dtype), rejected.detach().to(losses.dtype)
        return PreferenceLoss(loss, losses, LossStats(_pair_statistics(c, r, 1.0).float(), _REWARD_STATS))
    code = len(reference.KINDS) + reference.REWARD_KINDS.index(kind)
    numbers = [1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    loss, losses, stats = _run(chosen, rejected, None, None, margin, None, None, None, over, code, numbers, backend)
    return PreferenceLoss(loss, losses, LossStats(stats, _REWARD_STATS))
