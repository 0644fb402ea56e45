"""Losses on pairs of sequences and on scalar predictions."""

from __future__ import annotations

from typing import Any, NamedTuple

from .losses import LossAndStats, empty_results, with_names
from .native import address, bound, empty, extension, line, number, one_of, same_shape, tokens, wide
from .view import FLOATS, MASKS, View, give_back, view

KINDS = ("dpo", "robust", "ipo", "hinge", "rpo_sq", "rpo_fwd_kl", "rpo_bwd_kl", "simpo", "orpo", "kto")
REWARD_KINDS = ("bt", "margin_bt", "scaled_bt")
STATS = ("accuracy", "margin", "chosen_reward", "rejected_reward", "sft_loss")
REWARD_STATS = ("accuracy", "margin", "chosen_mean", "rejected_mean")
REGRESSION_STATS = ("mse", "mae", "count")


class PairLoss(NamedTuple):
    """`loss` a float, `losses` (B), `stats` floats by name."""

    loss: float
    losses: Any
    stats: dict[str, float]


def preference_loss(
    chosen: Any, rejected: Any, ref_chosen: Any, ref_rejected: Any, *, kind: str, beta: float = 0.1,
    label_smoothing: float = 0.0, chosen_rewards: Any = None, rejected_rewards: Any = None, reward_scale: float = 1.0,
    margin: float = 0.0, kl_baseline: float = 0.0, desirable_weight: float = 1.0, undesirable_weight: float = 1.0,
    sft_coef: float = 0.0, chosen_lengths: Any = None, denominator: float | None = None,
) -> PairLoss:  # fmt: skip
    """`fastrlhf.preference_loss`."""
    if kind == "cdpo" and not label_smoothing:
        raise ValueError("label_smoothing: must be > 0 for kind='cdpo', got 0")
    kind = {"cdpo": "dpo", "spin": "dpo"}.get(kind, kind)
    code = one_of("kind", kind, KINDS)
    if not number("label_smoothing", label_smoothing, 0.0, 0.5) < 0.5:
        raise ValueError("label_smoothing: expected in [0, 0.5), got 0.5")
    if (ref_chosen is None) != (ref_rejected is None):
        raise ValueError("ref_chosen, ref_rejected: give both or neither")
    if (alone := kind in ("simpo", "orpo")) != (ref_chosen is None):
        raise ValueError(f"ref_chosen: kind {kind!r} {'has no reference' if alone else 'needs the reference'}")
    if kind.startswith("rpo") and (chosen_rewards is None or rejected_rewards is None):
        raise ValueError(f"chosen_rewards, rejected_rewards: kind {kind!r} needs both")
    numbers = (
        bound("beta", beta), label_smoothing, number("reward_scale", reward_scale), number("margin", margin),
        number("kl_baseline", kl_baseline, 0.0), number("desirable_weight", desirable_weight),
        number("undesirable_weight", undesirable_weight), number("sft_coef", sft_coef),
    )  # fmt: skip
    rest = {
        "ref_chosen": ref_chosen, "ref_rejected": ref_rejected, "chosen_rewards": chosen_rewards,
        "rejected_rewards": rejected_rewards, "chosen_lengths": chosen_lengths,
    }  # fmt: skip
    return _pairs("preference_loss", chosen, rejected, rest, code, numbers, denominator, STATS)


def reward_loss(
    chosen: Any, rejected: Any, margin: Any = None, *, kind: str = "bt", denominator: float | None = None
) -> PairLoss:
    """`fastrlhf.reward_loss`."""
    code = len(KINDS) + one_of("kind", kind, REWARD_KINDS)
    if (margin is None) != (kind == "bt"):
        raise ValueError(f"margin: kind {kind!r} {'has none' if kind == 'bt' else 'needs one'}, got {type(margin).__name__}")
    numbers = (1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0)
    return _pairs("reward_loss", chosen, rejected, {"margin": margin}, code, numbers, denominator, REWARD_STATS)


def _pairs(
    op: str, chosen: Any, rejected: Any, rest: dict[str, Any], code: int, numbers: tuple[float, ...],
    denominator: float | None, names: tuple[str, ...],
) -> PairLoss:  # fmt: skip
    c, r = view("chosen", chosen, FLOATS), view("rejected", rejected, FLOATS)
    if len(c.shape) != 1:
        raise ValueError(f"chosen: expected shape (B,), got {c.shape}")
    same_shape("rejected", r, "chosen", c)
    found: dict[str, View | None] = {}
    for name, x in rest.items():
        found[name] = None if x is None else view(name, x, MASKS if name == "chosen_lengths" else FLOATS)
        same_shape(name, found[name], "chosen", c)
    order = ("ref_chosen", "ref_rejected", "chosen_rewards", "rejected_rewards", "chosen_lengths")
    if op == "reward_loss":
        found["chosen_rewards"] = found["margin"]  # where the extension takes it
    pairs, f64 = c.shape[0], wide(c, r)
    native, _ = extension(op, c)
    loss, stats = empty_results(f64, names)
    losses = empty(chosen, c, c.shape, f64)
    native.preference_loss(
        pairs, f64, code, tuple(tokens(v, True) for v in (c, r, *(found.get(n) for n in order))),
        (*numbers, float(max(pairs, 1)) if denominator is None else bound("denominator", denominator)),
        (address(loss), address(losses), 0, 0, 0, 0, address(stats)),
    )  # fmt: skip
    total, statistics = with_names(loss, stats, names)
    return PairLoss(total, give_back(chosen, losses), statistics)


def regression_loss(predictions: Any, targets: Any, *, ignore_value: float = -100.0) -> LossAndStats:
    """`fastrlhf.regression_loss` of two contiguous arrays of one shape."""
    p, t = view("predictions", predictions, FLOATS), view("targets", targets, FLOATS)
    same_shape("targets", t, "predictions", p)
    for name, v in (("predictions", p), ("targets", t)):
        if not v.contiguous:
            raise ValueError(f"{name}: must be contiguous, got strides {v.strides}")
    native, _ = extension("regression_loss", p)
    f64 = wide(p, t)
    loss, stats = empty_results(f64, REGRESSION_STATS)
    native.regression_loss(
        p.size, f64, line(p), line(t), number("ignore_value", ignore_value), address(loss), 0, address(stats)
    )
    return with_names(loss, stats, REGRESSION_STATS)
