"""What several hosts compute, with the choices that they make differently as arguments."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...ops import backend as backends
from ...ops import checks
from ...ops.masked_stats import moments, row_sums, standardize_by
from ..seam import obstacle

NO_LABEL = -(2**31)  # for hosts to which -100 is an error


def logprobs(
    logits: Tensor, labels: Tensor, *, dtype: torch.dtype | None = None, ignore_index: int = NO_LABEL, **options: Any
) -> Tensor:
    """Log-probs of labels, in the logits' dtype where the host rounds to it."""
    out = ops.logprobs(logits, labels, ignore_index=ignore_index, **options).logprobs
    return out.to(logits.dtype if dtype is None else dtype)


def entropy(logits: Tensor, *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    """Entropy alone."""
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    out = ops.logprobs(logits, labels, entropy=True, **options).entropy
    assert out is not None
    return out.to(logits.dtype if dtype is None else dtype)


def statistics_obstacle(values: Any, mask: Any) -> str | None:
    """Why our masked statistics do not give the host's result; None if they do. The hosts' dtype of a result follows from
    promotion, which is float32 for float32 values alone."""
    reason = obstacle(values, "masked_mean")
    if reason is not None:
        return reason
    if values.dtype != torch.float32:
        return f"values of {values.dtype}"
    if not isinstance(mask, Tensor) or mask.dtype not in checks.MASKS or mask.dtype == torch.float64:
        return f"a mask of {getattr(mask, 'dtype', type(mask).__name__)}"
    if mask.shape != values.shape or mask.device != values.device:
        return "a mask that is broadcast or elsewhere"
    if mask.requires_grad and torch.is_grad_enabled():
        return "a mask with a gradient"
    return None


def carry_obstacle(rewards: Any, values: Any, mask: Any) -> str | None:
    """Why our GAE over a mask that is carried over does not give the host's result, which blends with fractions of a mask. A
    mask of bool or integers is taken for 0 and 1, one of floats is looked at, which waits for the device."""
    reason = statistics_obstacle(rewards, mask) or obstacle(values, "gae")
    if reason is None and values.dtype != torch.float32:
        reason = f"values of {values.dtype}"
    if reason is None and mask.is_floating_point() and not zeros_and_ones(mask):
        reason = "a mask with fractions"
    return reason


def zeros_and_ones(mask: Tensor) -> bool:
    """Whether it holds nothing else. On the CPU by its own moments, Σ m (m - mean)² with m for weights, which is 0 where all
    that counts is alike: comparing with 0 and with 1 took half the time of verl's GAE."""
    if not mask.is_cpu or mask.numel() == 0:
        return bool(((mask == 0) | (mask == 1)).all())
    n, mean, m2 = moments(mask, mask, backends.choose("masked_var", mask, None)).tolist()
    return bool(mask.amin() >= 0) and (n == 0 or (mean == 1 and m2 == 0))


def sums(values: Tensor, mask: Tensor, dim: int | None) -> Tensor:
    """Σ m x over all, or over one dimension."""
    backend = backends.choose("masked_mean", values, None)
    if dim is None:
        return row_sums(backends.flat(values), backends.flat(mask), False, backend=backend)[0]
    x, m = values.movedim(dim, -1), mask.movedim(dim, -1)
    wide = x.reshape(-1, x.shape[-1])
    return row_sums(wide, m.reshape(wide.shape), False, backend=backend)[0].reshape(x.shape[:-1])


def whiten_all(
    x: Tensor,
    mask: Tensor,
    *,
    shift_mean: bool,
    unbiased: bool,
    eps: float,
    of: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Whitened by the moments of what the mask counts, also where it does not; `out` may be x."""
    backend = backends.choose("whiten", x, None)
    if of is None:
        of = moments(x, mask, backend)
    return standardize_by(of, x, None, shift_mean, unbiased, eps, backend, out)


def group_ids(index: Any, device: torch.device) -> Tensor:
    """Integers for labels of any hashable kind."""
    seen: dict[Any, int] = {}
    labels = index.reshape(-1).tolist() if isinstance(index, Tensor) else index
    return torch.tensor([seen.setdefault(i, len(seen)) for i in labels], dtype=torch.int64, device=device)


def group_advantages(scores: Tensor, ids: Tensor, *, kind: str, alone: str = "score", **options: Any) -> Tensor:
    """`ops.group_advantages` with the host's choice for a group of one: its score, as if its mean were 0 (and its deviation
    1, which is the operation's own choice for grpo), or 0."""
    out = ops.group_advantages(scores, ids, kind=kind, **options)
    if kind == "grpo" and alone == "score":
        return out
    single = torch.bincount(ids)[ids] == 1 if len(ids) else ids.bool()
    return torch.where(single, scores.to(out.dtype) if alone == "score" else torch.zeros_like(out), out)


def own_shard(logits: Tensor, group: Any) -> ops.VocabParallel:
    """This rank's columns, of equal shards in rank order; asked of the group itself, which need not be torch's default."""
    columns, rank = logits.shape[-1], group.rank()
    return ops.VocabParallel(group, rank * columns, (rank + 1) * columns, group.size() * columns)


def denominator(mode: str, width: int, dp_size: float, tokens: Any, sequences: Any, scale: Any = None) -> float | Tensor | None:
    """What a reduction divides by for a host that gives global counts and multiplies by dp_size."""
    if mode == "token-sum":
        return None
    count = tokens if mode == "token-mean" else sequences
    if count is None:
        return None
    if mode == "seq-mean-token-sum-norm":
        count = count * (width if scale is None else scale)
    return count / dp_size


@functools.cache
def flash_attention() -> bool:
    """Whether the hosts find flash-attn's cross entropy."""
    try:
        return hasattr(importlib.import_module("flash_attn.ops.triton.cross_entropy"), "cross_entropy_loss")
    except ImportError:
        return False
