"""The little communication the ops need: a `group` is a torch process group, or anything with one in `.process_group`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def process_group(group: Any) -> Any:
    return getattr(group, "process_group", group)


def size_and_rank(group: Any) -> tuple[int, int]:
    group = process_group(group)
    return dist.get_world_size(group), dist.get_rank(group)


def all_gather(t: Tensor, group: Any) -> Tensor:
    """(ranks, *t.shape), in rank order."""
    group = process_group(group)
    parts = [torch.empty_like(t) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, t.contiguous(), group=group)
    return torch.stack(parts)


def all_reduce_sum(t: Tensor, group: Any) -> Tensor:
    """The sum over ranks, added in rank order: every rank and every run gets the same bits."""
    return all_gather(t, group).sum(0)


def merge_moments(of: Tensor, group: Any) -> Tensor:
    """(n, mean, M2) of all ranks' elements together, merged pairwise in rank order (Chan et al. 1979): float64 (3)."""
    n, mean, m2 = torch.zeros(3, dtype=of.dtype, device=of.device)
    for k, mu, s in all_gather(of, group):
        total, delta = n + k, mu - mean
        over = torch.where(total != 0, total, torch.ones_like(total))
        mean, m2, n = mean + delta * (k / over), m2 + s + delta * delta * (n * k / over), total
    return torch.stack([n, mean, m2])
