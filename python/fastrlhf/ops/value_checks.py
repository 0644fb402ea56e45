"""Checks of the values in tensors, as the CPU kernels make them: for the reference, and for a GPU where FASTRLHF_CHECK=1
asks for them, since looking waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backend as backends


def wanted(backend: str) -> bool:
    """Whether the values of a GPU call are to be looked at."""
    return backends.CHECK and backend in ("cuda", "triton") and not torch.compiler.is_compiling()


def labels(t: Tensor, total: int, ignore_index: int) -> None:
    """Every label in [0, total), or ignore_index."""
    outside = (t != ignore_index) & ((t < 0) | (t >= total))
    _columns("labels", t, outside, total, f" and is not ignore_index ({ignore_index})")


def ids(name: str, t: Tensor, total: int) -> None:
    """Every one in [0, total)."""
    if not torch.compiler.is_compiling():
        _columns(name, t, (t < 0) | (t >= total), total)


def _columns(name: str, t: Tensor, outside: Tensor, total: int, but: str = "") -> None:
    if bool(outside.any()):
        i = int(outside.reshape(-1).nonzero()[0, 0])
        raise IndexError(f"{name}: {t.reshape(-1)[i].item()} at flat position {i} is outside [0, {total}){but}")


def temperatures(t: Tensor | None) -> None:
    if t is not None and not bool(((t >= 1e-20) & (t <= 1e20)).all()):
        raise ValueError("temperature: every value must lie in [1e-20, 1e20]")


def kept(indptr: Tensor | None, indices: Tensor | None, total: int) -> None:
    """A CSR kept set: rows that do not fall and end with the indices, each of them in [0, total)."""
    if indptr is None or indices is None:
        return
    ends = indptr.tolist()
    if ends[0] != 0 or any(b < a for a, b in zip(ends, ends[1:])) or ends[-1] != indices.shape[0]:
        raise ValueError(f"kept: indptr must begin with 0, not fall, and end with the {indices.shape[0]} indices")
    outside = (indices < 0) | (indices >= total)
    if bool(outside.any()):
        i = int(outside.nonzero()[0, 0])
        raise IndexError(f"kept: index {int(indices[i])} at position {i} is outside [0, {total})")


def pack(cu: Tensor | None, t: Tensor) -> None:
    """Boundaries that begin with 0, do not fall, and end with the tokens."""
    if cu is None or torch.compiler.is_compiling():
        return
    ends = cu.tolist()
    if ends[0] != 0 or any(b < a for a, b in zip(ends, ends[1:])) or ends[-1] != t.shape[0]:
        raise ValueError(f"cu_seqlens: must begin with 0, not fall, and end with the {t.shape[0]} tokens, got {ends}")


def unit_interval(name: str, t: Tensor | None) -> None:
    if t is not None and not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"{name}: expected values in [0, 1], got {t.tolist()}")


def sampled(tokens: Tensor) -> None:
    """That every row could be sampled."""
    rows = (tokens.reshape(-1) < 0).nonzero()
    if rows.shape[0]:
        raise ValueError(f"logits: row {int(rows[0, 0])} has no largest finite logit to sample from")
