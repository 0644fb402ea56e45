"""The extension, and arrays as it takes them."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import os
from typing import Any

import numpy as np

from .view import CODES, CPU, FLOATS, View, view

Argument = tuple[int, int, tuple[int, ...], bool]


@functools.cache
def cpu() -> Any:
    """The CPU kernels."""
    try:
        module = importlib.import_module("fastrlhf._cpu")
    except ImportError as error:
        raise ImportError(f"fastrlhf was not built: {error}. Install it with pip; see README.md.") from error
    if os.environ.get("FASTRLHF_CPU_ISA"):
        module.set_isa(os.environ["FASTRLHF_CPU_ISA"])
    return module


@functools.cache
def cuda() -> Any:
    """The CUDA kernels; None where they are not built."""
    return importlib.import_module("fastrlhf._cuda") if importlib.util.find_spec("fastrlhf._cuda") is not None else None


def extension(op: str, first: View, *, on_gpu: bool = False) -> tuple[Any, int]:
    """What serves an array, and what it runs on: threads, or CUDA's default stream."""
    if first.device == CPU:
        return cpu(), threads()
    if not on_gpu:
        raise ValueError(f"{op}: arrays in a GPU's memory are not taken by this function; copy them to the CPU")
    if cuda() is None:
        raise ValueError(f"{op}: the CUDA kernels are not part of this build (FASTRLHF_CUDA=on builds them)")
    return cuda(), 0


@functools.cache
def threads() -> int:
    """OMP_NUM_THREADS, else the cores of this process."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def wide(*views: View | None) -> bool:
    """Whether the result is float64."""
    return any(v is not None and v.dtype == "float64" for v in views)


def empty(like: Any, first: View, shape: tuple[int, ...], float64: bool) -> Any:
    """Memory for a result: NumPy's on the CPU, the argument's library's on a GPU, where it must be one whose arrays may be
    written (CuPy; not JAX)."""
    if first.device == CPU:
        return np.empty(shape, np.float64 if float64 else np.float32)
    library = like.__array_namespace__() if hasattr(like, "__array_namespace__") else None
    if library is None or not hasattr(library, "empty"):
        raise ValueError(
            f"results for a {type(like).__name__} on a GPU cannot be allocated: it has no __array_namespace__ with empty()"
        )
    return library.empty(shape, dtype=library.float64 if float64 else library.float32)


def address(x: Any) -> int:
    return 0 if x is None else view("result", x, FLOATS).pointer


def tokens(v: View | None, per_row: bool = False) -> Argument | None:
    """(B, T), packed (total), or one value for each row."""
    return None if v is None else (v.pointer, CODES[v.dtype], v.strides, per_row)


def line(v: View) -> Argument:
    """All elements as one row."""
    return (v.pointer, CODES[v.dtype], (1,), False)


def rows(v: View, cu_seqlens: View | None = None) -> tuple[int, int, int, int]:
    if cu_seqlens is not None:
        return (cu_seqlens.shape[0] - 1, 0, cu_seqlens.pointer, v.shape[0])
    return (v.shape[0], v.shape[1], 0, 0) if len(v.shape) == 2 else (1, v.shape[0], 0, 0)


def matrix(name: str, v: View) -> tuple[int, int, int, int, int]:
    """(..., V) with last stride 1."""
    if not v.shape or v.shape[-1] == 0:
        raise ValueError(f"{name}: expected (..., V) with V > 0, got shape {v.shape}")
    if v.strides[-1] != 1 and v.shape[-1] > 1:
        raise ValueError(f"{name}: the last dimension must be contiguous, got strides {v.strides}")
    if len(v.shape) <= 3 and len(v.shape) > 1:
        if len(v.shape) == 2:
            return (v.pointer, CODES[v.dtype], 1, v.strides[0], 0)
        return (v.pointer, CODES[v.dtype], max(v.shape[1], 1), v.strides[0], v.strides[1])
    if not v.contiguous:
        raise ValueError(f"{name}: more than three dimensions must be contiguous, got strides {v.strides}")
    return (v.pointer, CODES[v.dtype], 1, v.shape[-1], 0)


def same_shape(name: str, v: View | None, of: str, other: View) -> None:
    if v is not None and v.shape != other.shape:
        raise ValueError(f"{name}: expected the shape of {of}, {other.shape}, got {v.shape}")
    if v is not None and v.device != other.device:
        raise ValueError(f"{name}: must be where {of} is")


def one_of(name: str, value: str, choices: tuple[str, ...]) -> int:
    if value not in choices:
        raise ValueError(f"{name}: must be one of {choices}, got {value!r}")
    return choices.index(value)


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name}: expected a number in [{low}, {high}], got {value!r}")
    return float(value)


def bound(name: str, value: Any) -> float:
    """A limit > 0; infinity for None."""
    if value is None:
        return math.inf
    if not number(name, value) > 0:
        raise ValueError(f"{name}: expected a number > 0 or None, got {value!r}")
    return float(value)


def integer(name: str, value: Any, low: int = -(2**63), high: int = 2**63 - 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected an integer in [{low}, {high}], got {value}")
    return int(value)
