"""Which implementation serves a call, and how tensors are handed to the extension."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_cpu: Any = None
try:
    _cpu = importlib.import_module("fastrlhf._cpu")
except ImportError as error:  # a source tree without a build
    _missing = str(error)

BACKENDS = ("cuda", "triton", "cpu", "reference")
DTYPES = {
    torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3,
    torch.int32: 4, torch.int64: 5, torch.uint8: 6, torch.bool: 6,
}  # fmt: skip
_FLOAT32, _FLOAT64 = torch.float32, torch.float64
_LARGE = 2**20  # elements
_TEMPLATES = {dtype: torch.empty((), dtype=dtype, device="cpu") for dtype in DTYPES}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_default = os.environ.get("FASTRLHF_BACKEND") or None
if _default is not None and _default not in BACKENDS:
    raise ValueError(f"FASTRLHF_BACKEND must be one of {BACKENDS}, got {_default!r}")
if _cpu is not None and os.environ.get("FASTRLHF_CPU_ISA"):
    _cpu.set_isa(os.environ["FASTRLHF_CPU_ISA"])


def extension() -> Any:
    """The compiled CPU kernels."""
    if _cpu is None:
        raise ImportError(f"fastrlhf was not built: {_missing}. Install it with pip; see README.md.")
    return _cpu


def choose(op: str, tensor: Tensor, backend: str | None) -> str:
    """The backend of a call: `backend`, else FASTRLHF_BACKEND, else what the tensor's device has. One that cannot serve
    the call is an error: nothing falls back to something slower on its own."""
    name = backend or _default
    if name is None:
        if tensor.is_cpu and _cpu is not None:
            return "cpu"
        if tensor.is_cpu:
            extension()
        raise ValueError(
            f"{op}: no kernels for device '{tensor.device}' in this build; the plain PyTorch definition runs anywhere "
            "with backend='reference'"
        )
    if name == "reference":
        return name
    if name == "cpu":
        if not tensor.is_cpu:
            raise ValueError(f"{op}: backend 'cpu' needs CPU tensors, got one on '{tensor.device}'")
        extension()
        return name
    if name in BACKENDS:
        raise ValueError(f"{op}: backend '{name}' is not part of this build")
    raise ValueError(f"backend: must be one of {BACKENDS}, got {name!r}")


threads = torch.get_num_threads  # the kernels use as many as torch does


def result_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where an input is, float32 otherwise."""
    for t in tensors:
        if t is not None and t.dtype is _FLOAT64:
            return _FLOAT64
    return _FLOAT32


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory for the extension to write: always on the CPU and of this dtype, whatever torch's defaults are. A template's
    `new_empty` of sizes, not of a shape, takes half the time of `torch.empty`."""
    template = _TEMPLATES[dtype]
    t = template.new_empty(*shape) if shape else torch.empty_like(template)
    return _huge(t) if t.numel() > _LARGE else t


def _huge(t: Tensor) -> Tensor:
    _cpu.prefer_huge_pages(t.data_ptr(), t.nbytes)
    return t


def empty_as(like: Tensor, dtype: torch.dtype) -> Tensor:
    """The same, of a tensor's shape; the quickest way there is where the tensor is one like it."""
    if like.dtype is dtype and like.is_contiguous():
        t = torch.empty_like(like)
        return _huge(t) if t.numel() > _LARGE else t
    return empty(like.shape, dtype)


def empties(like: Tensor, dtype: torch.dtype, *wanted: bool) -> list[Any]:
    """`empty_as` for several outputs; None for those not wanted."""
    if like.dtype is dtype and like.numel() <= _LARGE and like.is_contiguous():
        return [torch.empty_like(like) if w else None for w in wanted]
    return [empty_as(like, dtype) if w else None for w in wanted]


def empty_scalar(dtype: torch.dtype) -> Tensor:
    return torch.empty_like(_TEMPLATES[dtype])


def empty_stats(names: tuple[str, ...]) -> Tensor:
    """A loss's statistics."""
    return _TEMPLATES[_FLOAT32].new_empty(len(names))


def scalar(value: float, dtype: torch.dtype) -> Tensor:
    return torch.full_like(_TEMPLATES[dtype], value)


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def matrix(t: Tensor) -> tuple[int, int, int, int, int]:
    """(..., V) with last stride 1 as the extension takes it; `with_rows` has made sure that the rows have two strides."""
    stride = t.stride()
    if len(stride) == 2:
        return (t.data_ptr(), DTYPES[t.dtype], 1, stride[0], 0)
    if len(stride) == 3:
        return (t.data_ptr(), DTYPES[t.dtype], max(t.shape[1], 1), stride[0], stride[1])
    return (t.data_ptr(), DTYPES[t.dtype], 1, t.shape[-1], 0)


def with_rows(t: Tensor) -> Tensor:
    """t itself, or a view of it, with at most three dimensions; a copy only where no such view exists."""
    if t.dim() <= 3:
        return t
    if t.numel() == 0:
        return t.reshape(t.numel() // t.shape[-1], t.shape[-1])
    try:
        return t.view(-1, t.shape[-2], t.shape[-1])
    except RuntimeError:
        return t.contiguous().view(-1, t.shape[-2], t.shape[-1])


Array = tuple[int, int, tuple[int, ...], bool]  # as the extension takes an input of one or two dimensions


def tokens(t: Tensor | None) -> Array | None:
    """(B, T) or packed (total), any strides."""
    return None if t is None else (t.data_ptr(), DTYPES[t.dtype], t.stride(), False)


def row_values(t: Tensor | None) -> Array | None:
    """(B): one value for each row."""
    return None if t is None else (t.data_ptr(), DTYPES[t.dtype], t.stride(), True)


def row_shape(t: Tensor, cu_seqlens: Tensor | None = None) -> tuple[int, int, int, int]:
    """The rows of (B, T), of a pack, or of plain (T), which is one row."""
    if cu_seqlens is not None:
        return (cu_seqlens.shape[0] - 1, 0, cu_seqlens.data_ptr(), t.shape[0])
    shape = t.shape
    if len(shape) == 2:
        return (shape[0], shape[1], 0, 0)
    return (1, shape[0], 0, 0)


def disjoint_rows(t: Tensor) -> bool:
    """Whether no two rows of (..., V) share memory."""
    extent = t.shape[-1]
    for stride, size in sorted((s, n) for s, n in zip(t.stride()[:-1], t.shape[:-1], strict=True) if n > 1):
        if stride < extent:
            return False
        extent = stride * size
    return True


def in_line(t: Tensor) -> Tensor:
    """t, or a copy of it, as `elements` takes it."""
    return t if t.dim() == 1 else t.contiguous()


def elements(t: Tensor) -> Array:
    """All elements as one row, or as one value for each row, for ops to which the shape means nothing. No view: making one
    takes longer than all the rest of handing a tensor over."""
    return (t.data_ptr(), DTYPES[t.dtype], t.stride() if t.dim() == 1 else (1,), False)


def flat(t: Tensor) -> Tensor:
    """All elements in one dimension, for ops to which the shape means nothing."""
    return t if t.dim() == 1 else t.view(-1) if t.is_contiguous() else t.reshape(-1)
