"""Argument checks. Every message names the argument, what came and what was expected."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .backend import FLOATS

MASKS = (torch.bool, torch.uint8, torch.int32, torch.int64, *FLOATS)


def shape_of(t: Tensor) -> str:
    return "(" + ", ".join(str(n) for n in t.shape) + ")"


def tensor(name: str, t: Any, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    if t.dtype not in dtypes:
        raise TypeError(f"{name}: expected one of {[str(d) for d in dtypes]}, got {t.dtype}")


def logits(name: str, t: Any) -> torch.Size:
    """(..., V) with V >= 1 and last stride 1; returns the shape."""
    if not isinstance(t, Tensor) or t.dtype not in FLOATS:
        tensor(name, t)
    shape: torch.Size = t.shape
    if len(shape) < 1 or shape[-1] < 1:
        raise ValueError(f"{name}: expected shape (..., V) with V >= 1, got {shape_of(t)}")
    if shape[-1] > 1 and t.stride()[-1] != 1:
        raise ValueError(f"{name}: expected last stride 1, got {t.stride(-1)}; call .contiguous()")
    return shape


def like(name: str, t: Any, other_name: str, other: Tensor, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """A tensor of another's shape and device."""
    if not isinstance(t, Tensor) or t.dtype not in dtypes:
        tensor(name, t, dtypes)
    if t.shape != other.shape:
        raise ValueError(f"{name}: expected the shape of {other_name}, {shape_of(other)}, got {shape_of(t)}")
    if not (t.is_cpu and other.is_cpu):
        same_device(name, t, other_name, other)


def same_device(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    if not (t.is_cpu and other.is_cpu) and t.device != other.device:
        raise ValueError(f"{name}: expected on {other_name}'s device '{other.device}', got '{t.device}'")


def rows(name: str, t: Any, count: int, what: str, like_: Tensor, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """A (B) tensor."""
    if not isinstance(t, Tensor) or t.dtype not in dtypes:
        tensor(name, t, dtypes)
    if t.shape != (count,):
        raise ValueError(f"{name}: expected shape ({count},), one value for each {what}, got {shape_of(t)}")
    if not (t.is_cpu and like_.is_cpu):
        same_device(name, t, what, like_)


def number(name: str, x: Any, *, low: float = -math.inf, high: float = math.inf, open_low: bool = False) -> None:
    """A finite number in [low, high], or (low, high]."""
    if type(x) is float and low < x <= high and x != math.inf:
        return
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(x).__name__}")
    if not low <= x <= high or x in (math.inf, -math.inf) or (open_low and x == low):
        bounds = f"{'(' if open_low or low == -math.inf else '['}{low}, {high}{')' if high == math.inf else ']'}"
        raise ValueError(f"{name}: expected a finite number in {bounds}, got {x}")


def temperature(x: Any, name: str = "temperature") -> None:
    """Where the arithmetic of scaled differences holds."""
    if type(x) is float and 1e-20 <= x <= 1e20:
        return
    number(name, x, low=0, open_low=True)
    if not 1e-20 <= x <= 1e20:
        raise ValueError(f"{name}: expected in [1e-20, 1e20], got {x}")


def positive_or_none(name: str, x: Any) -> None:
    if x is not None:
        number(name, x, low=0, open_low=True)


def one_of(name: str, x: Any, options: tuple[str, ...]) -> int:
    """The index of a string among its options."""
    try:
        return options.index(x)
    except ValueError:
        raise ValueError(f"{name}: expected one of {options}, got {x!r}") from None


def cu_seqlens(cu: Any, t: Tensor, name: str) -> Tensor:
    """(B + 1) segment boundaries of a packed (total) tensor, as int64; their values are checked with the data."""
    tensor("cu_seqlens", cu, (torch.int32, torch.int64))
    if cu.dim() != 1 or cu.shape[0] < 1:
        raise ValueError(f"cu_seqlens: expected shape (B + 1,), got {shape_of(cu)}")
    if t.dim() != 1:
        raise ValueError(f"{name}: expected packed, (total,), with cu_seqlens, got {shape_of(t)}")
    same_device("cu_seqlens", cu, name, t)
    return cu.long().contiguous()


def token_matrix(name: str, t: Any, cu: Any = None) -> Tensor | None:
    """(B, T), or (T) as one row, or with cu_seqlens packed (total); returns cu_seqlens as int64."""
    tensor(name, t)
    if cu is not None:
        return cu_seqlens(cu, t, name)
    if t.dim() not in (1, 2):
        raise ValueError(f"{name}: expected shape (B, T), or (total,) with cu_seqlens, got {shape_of(t)}")
    return None


def row_count(t: Tensor, cu: Tensor | None) -> int:
    if cu is not None:
        return cu.shape[0] - 1
    return t.shape[0] if t.dim() == 2 else 1
