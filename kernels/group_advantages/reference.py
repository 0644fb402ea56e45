"""The definition of the group-relative advantages."""

from __future__ import annotations

import torch
from torch import Tensor

from ..logprobs.reference import compute_dtype
from ..masked_stats.reference import whiten

KINDS = ("grpo", "dr_grpo", "rloo", "reinforce++", "opo")


def group_advantages(
    scores: Tensor,
    group_ids: Tensor,
    *,
    kind: str = "grpo",
    eps: float = 1e-6,
    unbiased: bool = True,
    lengths: Tensor | None = None,
) -> Tensor:
    """Each score against its group: see `fastrlhf.group_advantages`."""
    s = scores.to(compute_dtype(scores))
    out = torch.zeros_like(s)
    for group in group_ids.unique().tolist():
        members = (group_ids == group).nonzero().squeeze(-1)
        x, n = s[members], len(members)
        if kind == "grpo":
            spread = x.std(unbiased=unbiased) if n > 1 else torch.ones_like(x[0])
            centred = x if n == 1 else x - x.mean()
            value = centred / (spread + eps) if spread > 0 else torch.zeros_like(x)
        elif kind == "rloo":
            value = x if n == 1 else (x - x.mean()) * n / (n - 1)
        elif kind == "opo":
            assert lengths is not None
            w = lengths[members].to(s.dtype)
            value = x - ((w * x).sum() / w.sum() if w.sum() > 0 else 0)
        else:
            value = x - x.mean()
        out[members] = value
    return whiten(out, None, unbiased=unbiased, eps=eps) if kind == "reinforce++" else out
