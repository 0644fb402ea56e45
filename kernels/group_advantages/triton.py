"""Group-relative advantages: each score finds its group by comparing ids with all of the batch, some thousands."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.launch import launch
from ..common.tiles import tile
from ..common.triton_tokens import plain


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["s_scores", "s_ids", "s_lengths"])
def group_kernel(
    scores, group_ids, lengths, advantages, n, s_scores, s_ids, s_lengths, eps,
    KIND: tl.constexpr, UNBIASED: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """grpo, dr_grpo, rloo, reinforce++ (before it is whitened), opo; sums over a group in double, in the batch's order."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own_id = tl.load(group_ids + i.to(tl.int64) * s_ids, mask=i < n, other=0)[:, None]
    s = tl.load(scores + i.to(tl.int64) * s_scores, mask=i < n, other=0).to(tl.float64)
    members, total = tl.zeros([BLOCK, WIDTH], tl.float64), tl.zeros([BLOCK, WIDTH], tl.float64)
    weights = tl.zeros([BLOCK, WIDTH], tl.float64)
    for first in range(0, n, WIDTH):
        j = (first + tl.arange(0, WIDTH)).to(tl.int64)
        same = (tl.load(group_ids + j * s_ids, mask=j < n, other=0)[None, :] == own_id) & (j < n)[None, :]
        other = tl.load(scores + j * s_scores, mask=j < n, other=0).to(tl.float64)[None, :]
        members += tl.where(same, 1.0, 0.0)
        if KIND == 4:
            length = tl.load(lengths + j * s_lengths, mask=j < n, other=0).to(tl.float64)[None, :]
            total += tl.where(same, length * other, 0.0)
            weights += tl.where(same, length, 0.0)
        else:
            total += tl.where(same, other, 0.0)
    size = tl.maximum(tl.sum(members, 1), 1.0)
    if KIND == 4:
        weight = tl.sum(weights, 1)
        out = s - tl.where(weight > 0, tl.sum(total, 1) / tl.where(weight > 0, weight, 1.0), 0.0)
    else:
        mean = tl.sum(total, 1) / size
        out = s - mean
        if KIND == 0:
            m2 = tl.zeros([BLOCK, WIDTH], tl.float64)
            for first in range(0, n, WIDTH):
                j = (first + tl.arange(0, WIDTH)).to(tl.int64)
                same = (tl.load(group_ids + j * s_ids, mask=j < n, other=0)[None, :] == own_id) & (j < n)[None, :]
                d = tl.load(scores + j * s_scores, mask=j < n, other=0).to(tl.float64)[None, :] - mean[:, None]
                m2 += tl.where(same, d * d, 0.0)
            square = tl.sum(m2, 1)
            over = tl.maximum(size - 1, 1.0) if UNBIASED else size
            spread = tl.sqrt(tl.where(square > 0, square, 1.0) / over) + eps
            out = tl.where(size == 1, s / (1.0 + tl.cast(eps, tl.float64)), tl.where(square == 0, 0.0, out / spread))
        elif KIND == 2:
            out = tl.where(size == 1, s, out * (size / tl.maximum(size - 1, 1.0)))
    tl.store(advantages + i, out.to(tl.float32), mask=i < n)


def group_advantages(
    scores: torch.Tensor,
    group_ids: torch.Tensor,
    lengths: torch.Tensor | None,
    *,
    kind: int,
    eps: float,
    unbiased: bool,
    advantages: torch.Tensor,
) -> None:
    """Each score against its group."""
    n = scores.shape[0]
    choice = tile("group_advantages", scores, n)
    launch(
        group_kernel, (triton.cdiv(n, choice["BLOCK"]),), scores, group_ids, plain(lengths), advantages, n,
        scores.stride(0), group_ids.stride(0), 0 if lengths is None else lengths.stride(0), float(eps),
        KIND=kind, UNBIASED=unbiased, **choice,
    )  # fmt: skip
