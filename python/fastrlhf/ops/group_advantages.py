"""Group-relative advantages: each score against the other samples of its prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.group_advantages import reference
from . import checks
from .backend import choose, empty_as, extension, result_dtype, row_values, triton_kernels
from .library import Op
from .masked_stats import whiten


def group_advantages(
    scores: Tensor,
    group_ids: Tensor,
    *,
    kind: str = "grpo",
    eps: float = 1e-6,
    unbiased: bool = True,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Advantages of scores within their groups. No gradient.

    - ``grpo``: (s - mean) / (std + eps); a group of one has mean 0 and std 1;
    - ``dr_grpo``: s - mean;
    - ``rloo``: s - mean of the others; s itself in a group of one;
    - ``reinforce++``: s - mean, then whitened over the batch, (a - mean) / √(var + eps);
    - ``opo``: s - Σ length·score / Σ length of the group.

    Args:
        scores: (B), floating.
        group_ids: (B), int32 or int64, any values in any order.
        eps: >= 0.
        unbiased: std and var divide by n - 1.
        lengths: (B), the responses' lengths; for opo.
        backend: "triton", "cpu" or "reference"; None chooses.

    Returns:
        (B), float32 (float64 for float64 scores).

    Raises:
        TypeError, ValueError: dtype, shape or device that do not fit, an unknown kind, opo without lengths.

    Source: grpo Shao et al. 2024; dr_grpo Liu et al. 2025; rloo Ahmadian et al. 2024; reinforce++ Hu 2025; opo Hao et al.
    2025.
    """
    checks.tensor("scores", scores)
    if scores.dim() != 1:
        raise ValueError(f"scores: expected shape (B,), got {checks.shape_of(scores)}")
    checks.rows("group_ids", group_ids, scores.shape[0], "score", scores, (torch.int32, torch.int64))
    code = checks.one_of("kind", kind, reference.KINDS)
    checks.number("eps", eps, low=0)
    if lengths is not None:
        checks.rows("lengths", lengths, scores.shape[0], "score", scores, checks.MASKS)
    elif kind == "opo":
        raise ValueError("lengths: needed for kind='opo', got None")
    backend = choose("group_advantages", scores, backend)
    if backend == "reference":
        with torch.no_grad():
            return reference.group_advantages(scores, group_ids, kind=kind, eps=eps, unbiased=unbiased, lengths=lengths)
    out: Tensor = _group_advantages(scores, group_ids, lengths, code, eps, unbiased, backend)
    return whiten(out, None, unbiased=unbiased, eps=eps, backend=backend) if kind == "reinforce++" else out


def _implementation(
    scores: Tensor, group_ids: Tensor, lengths: Tensor | None, kind: int, eps: float, unbiased: bool, backend: str
) -> Tensor:
    dtype = result_dtype(scores)
    out = empty_as(scores, dtype)
    if backend == "triton":
        triton_kernels("group_advantages").group_advantages(
            scores, group_ids, lengths, kind=kind, eps=eps, unbiased=unbiased, advantages=out
        )
        return out
    extension().group_advantages(
        scores.shape[0], dtype == torch.float64, row_values(scores), row_values(group_ids), row_values(lengths), kind, eps,
        unbiased, out.data_ptr(),
    )  # fmt: skip
    return out


def _fake(scores: Tensor, *_: Any) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.float64 if scores.dtype == torch.float64 else torch.float32)


_group_advantages = Op(
    "group_advantages",
    "(Tensor scores, Tensor group_ids, Tensor? lengths, int kind, float eps, bool unbiased, str backend) -> Tensor",
    _implementation,
    _fake,
)
