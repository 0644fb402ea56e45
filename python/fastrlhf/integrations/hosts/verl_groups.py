"""verl's advantages within groups of answers to one prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..seam import Call, Calls, Entry, Seam, Sizes, decline, in_place_of, obstacle
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
            token_level_rewards: Tensor, response_mask: Tensor, index: Any, epsilon: float = 1e-6, config: Any = None,
            **kwargs: Any,
        ) -> tuple[Tensor, Tensor]:  # fmt: skip
            if reason := _obstacle(token_level_rewards):
                decline(f"verl {original.__name__}", reason)
                out: tuple[Tensor, Tensor] = original(token_level_rewards, response_mask, index, epsilon, config, **kwargs)
                return out
            return grouped(token_level_rewards, response_mask, index, epsilon, kind, alone, finish)

        return replacement

    return build


def grpo(original: Any) -> Any:
    @in_place_of(original)
    def replacement(
        token_level_rewards: Tensor, response_mask: Tensor, index: Any, epsilon: float = 1e-6,
        norm_adv_by_std_in_grpo: bool = True, config: Any = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if reason := _obstacle(token_level_rewards):
            decline(f"verl {original.__name__}", reason)
            given = (token_level_rewards, response_mask, index, epsilon, norm_adv_by_std_in_grpo, config)
            out: tuple[Tensor, Tensor] = original(*given)
            return out
        kind = "grpo" if norm_adv_by_std_in_grpo else "dr_grpo"
        return grouped(token_level_rewards, response_mask, index, epsilon, kind)

    return replacement


def _obstacle(rewards: Any) -> str | None:
    reason = obstacle(rewards, "group_advantages")
    return f"rewards of {rewards.dtype}" if reason is None and rewards.dtype != torch.float32 else reason


@torch.no_grad()
def grouped(
    rewards: Tensor, mask: Tensor, index: Any, eps: float, kind: str, alone: str = "score", finish: Finish = broadcast
) -> tuple[Tensor, Tensor]:
    """An answer's summed reward against those of its prompt."""
    scores = rewards.sum(-1)
    ids = semantics.group_ids(index, scores.device)
    lengths = mask.sum(-1) if kind == "opo" else None
    out = semantics.group_advantages(scores, ids, alone=alone, kind=kind, eps=eps, lengths=lengths)
    return finish(out, mask)


def calls(sizes: Sizes) -> Iterator[Call]:
    make = inputs(sizes)
    rows = max(sizes.rows, 2) * 3
    wide = inputs(Sizes(rows, sizes.length, dtype=sizes.dtype, device=sizes.device))
    rewards = torch.zeros_like(wide.batch())
    rewards[:, -1] = make.normal(rows)
    index = np.array([f"prompt {min(i // 3, 1) if i < rows - 1 else 'alone'}" for i in range(rows)], dtype=object)
    for dtype in (torch.float32, torch.int64):
        yield Call(f"{dtype} mask, groups of several sizes, one of one", (rewards, wide.mask(dtype), index), tolerance=1e-4)
    yield Call("an epsilon of 0.5", (rewards, wide.mask(), index, 0.5), tolerance=1e-4)


def vectorized(compared: Calls) -> Calls:
    """These take group ids as a tensor too."""

    def calls(sizes: Sizes) -> Iterator[Call]:
        for call in compared(sizes):
            yield call
        rewards, mask, index, *rest = call.args
        ids = semantics.group_ids(index, rewards.device) * 7
        yield Call("group ids in a tensor", (rewards, mask, ids, *rest), call.kwargs, tolerance=1e-4)

    return calls


def grpo_calls(sizes: Sizes) -> Iterator[Call]:
    for call in calls(sizes):
        yield call
        yield Call(f"{call.name}, not divided by std", call.args, {"norm_adv_by_std_in_grpo": False}, tolerance=1e-4)


def seam(name: str, build: Callable[[Any], Any], compared: Calls = calls) -> Seam:
    return Seam(
        ALGORITHMS, f"compute_{name}_outcome_advantage", build, compared, "group_advantages", ("ADV_ESTIMATOR_REGISTRY",)
    )


GROUP_SEAMS: tuple[Seam | Entry, ...] = (
    seam("grpo", grpo, grpo_calls),
    seam("grpo_vectorized", grpo, vectorized(grpo_calls)),
    seam("rloo", advantages("rloo")),
    seam("rloo_vectorized", advantages("rloo", alone="zero"), vectorized(calls)),
    seam("opo", advantages("opo")),
    seam("reinforce_plus_plus_baseline", advantages("dr_grpo", finish=whitened)),
)
