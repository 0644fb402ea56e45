"""verl's advantages within groups of answers to one prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..seam import Call, Entry, Seam, Sizes, decline, in_place_of, obstacle
from . import semantics
from .inputs import inputs

ALGORITHMS = "verl.trainer.ppo.core_algos"


def broadcast(scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """To every token of an answer, as advantages and as returns."""
    out = scores.unsqueeze(-1) * mask
    return out, out


def whitened(scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """REINFORCE++: over all tokens."""
    from .verl import counted_moments

    wide = (scores.unsqueeze(-1) * mask).contiguous()
    of = counted_moments(wide, mask)
    out = semantics.whiten_all(wide, mask, shift_mean=True, unbiased=True, eps=1e-8, of=of) * mask
    return out, out


Finish = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def advantages(kind: str, *, alone: str = "score", finish: Finish = broadcast) -> Callable[[Any], Any]:
    """One for each of verl's estimators; `alone` is what it gives a group of one."""

    def build(original: Any) -> Any:
        @in_place_of(original)
        def replacement(
            token_level_rewards: Tensor, response_mask: Tensor, index: Any, epsilon: float = 1e-6, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            reason = obstacle(token_level_rewards, "group_advantages")
            if reason is None and token_level_rewards.dtype != torch.float32:
                reason = f"rewards of {token_level_rewards.dtype}"
            if reason is None and args and not isinstance(args[0], bool):
                reason = "an argument it does not know"
            if reason is not None:
                decline(f"verl {original.__name__}", reason)
                return original(token_level_rewards, response_mask, index, epsilon, *args, **kwargs)
            scaled = args[0] if args else kwargs.get("norm_adv_by_std_in_grpo", True)
            with torch.no_grad():
                scores = token_level_rewards.sum(-1)
                ids = semantics.group_ids(index, scores.device)
                lengths = response_mask.sum(-1) if kind == "opo" else None
                which = "dr_grpo" if kind == "grpo" and not scaled else kind
                out = semantics.group_advantages(scores, ids, alone=alone, kind=which, eps=epsilon, lengths=lengths)
                return finish(out, response_mask)

        return replacement

    return build


def calls(sizes: Sizes) -> Iterator[Call]:
    make = inputs(sizes)
    rows = max(sizes.rows, 2) * 3
    wide = inputs(Sizes(rows, sizes.length, dtype=sizes.dtype, device=sizes.device))
    rewards = torch.zeros_like(wide.batch())
    rewards[:, -1] = make.normal(rows)
    index = np.array([f"prompt {min(i // 3, 1) if i < rows - 1 else 'alone'}" for i in range(rows)], dtype=object)
    for dtype in (torch.float32, torch.int64):
        yield Call(f"{dtype} mask, groups of several sizes, one of one", (rewards, wide.mask(dtype), index), tolerance=1e-4)


def grpo_calls(sizes: Sizes) -> Iterator[Call]:
    for call in calls(sizes):
        yield call
        yield Call(f"{call.name}, not divided by std", call.args, {"norm_adv_by_std_in_grpo": False}, tolerance=1e-4)


def seam(name: str, build: Callable[[Any], Any], compared: Callable[[Sizes], Iterator[Call]] = calls) -> Seam:
    return Seam(
        ALGORITHMS, f"compute_{name}_outcome_advantage", build, compared, "group_advantages", ("ADV_ESTIMATOR_REGISTRY",)
    )


GROUP_SEAMS: tuple[Seam | Entry, ...] = (
    seam("grpo", advantages("grpo"), grpo_calls),
    seam("grpo_vectorized", advantages("grpo"), grpo_calls),
    seam("rloo", advantages("rloo")),
    seam("rloo_vectorized", advantages("rloo", alone="zero")),
    seam("opo", advantages("opo")),
    seam("reinforce_plus_plus_baseline", advantages("dr_grpo", finish=whitened)),
)
