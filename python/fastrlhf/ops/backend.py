"""Which implementation serves a call, and how tensors are handed to the extension."""

from __future__ import annotations

import functools
import importlib
import importlib.util
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
# The ops that have CUDA kernels, and those that have Triton kernels.
CUDA = frozenset((
    "logprobs", "linear_logprobs", "linear_policy_loss", "logits_policy_loss", "shape_rewards", "gae", "discounted_returns",
    "experience", "masked_mean", "masked_var", "whiten", "sequence_logprobs", "policy_loss", "value_loss",
))  # fmt: skip
TRITON = CUDA | {
    "kl", "kl_full", "group_advantages", "preference_loss", "reward_loss", "regression_loss", "sample", "paged_attention",
    "topk_distill_loss",
}  # fmt: skip
DTYPES = {
    torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3,
    torch.int32: 4, torch.int64: 5, torch.uint8: 6, torch.bool: 6,
}  # fmt: skip
_FLOAT32, _FLOAT64 = torch.float32, torch.float64
_LARGE = 2**20  # elements
_TEMPLATES = {dtype: torch.empty((), dtype=dtype, device="cpu") for dtype in DTYPES}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# On a GPU the values of labels, boundaries and settings are looked at only when this asks for it: looking waits for the device.
CHECK = os.environ.get("FASTRLHF_CHECK", "") not in ("", "0")
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


_cuda: Any = None


def cuda_extension() -> Any:
    """The compiled CUDA kernels, loaded when first needed; None where they were not built."""
    global _cuda
    if _cuda is None and importlib.util.find_spec("fastrlhf._cuda") is not None:
        _cuda = importlib.import_module("fastrlhf._cuda")
    return _cuda


def use_cuda_extension(module: Any) -> None:
    """The tests put their build for the host here."""
    global _cuda
    _cuda = module
    _obstacle.cache_clear()


_recorded = False


def record_triton_launches() -> None:
    """From here on the Triton kernels are offered CPU tensors, for launches that are recorded, not run
    (`kernels.common.launch.recording`)."""
    global _recorded
    _recorded = True
    _obstacle.cache_clear()


@functools.cache
def triton_kernels(room: str, file: str = "triton") -> Any:
    """The Triton kernels of a room. Imported when first needed: Triton need not be there."""
    return importlib.import_module(f"fastrlhf.kernels.{room}.{file}")


def native(backend: str) -> Any:
    """The extension behind a compiled backend."""
    return extension() if backend == "cpu" else cuda_extension()


def lane(backend: str, t: Tensor) -> int:
    """What a compiled kernel runs on: so many threads, or a stream."""
    return threads() if backend == "cpu" else raw_stream(t)


def choose(op: str, tensor: Tensor, backend: str | None) -> str:
    """The backend of a call: `backend`, else FASTRLHF_BACKEND, else what the tensor's device has: on a CPU the compiled
    kernels, on a GPU CUDA where it is compiled for the device, else Triton. One that cannot serve the call is an error:
    nothing falls back to something slower on its own."""
    name = backend or _default
    if name is None and tensor.is_cpu:
        extension()
        return "cpu"
    if name == "reference":
        return name
    if name == "cpu":
        if not tensor.is_cpu:
            raise ValueError(f"{op}: backend 'cpu' needs CPU tensors, got one on '{tensor.device}'")
        extension()
        return name
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend: must be one of {BACKENDS}, got {name!r}")
    reasons = []
    for candidate in ("cuda", "triton") if name is None else (name,):
        reason = _obstacle(op, candidate, tensor.device)
        if reason is None:
            if tensor.dtype is _FLOAT64:
                _refuse_float64(op, candidate)
            return candidate
        reasons.append(f"{candidate}: {reason}")
    raise ValueError(
        f"{op}: no kernels for device '{tensor.device}': {'; '.join(reasons)}. The plain PyTorch definition runs anywhere with "
        "backend='reference'"
    )


@functools.cache
def _obstacle(op: str, backend: str, device: torch.device) -> str | None:
    """Why a GPU backend cannot serve an op on a device; None if it can."""
    if op not in (CUDA if backend == "cuda" else TRITON):
        return "this op has none"
    if backend == "cuda":
        module = cuda_extension()
        if module is None:
            return "not part of this build (FASTRLHF_CUDA=on builds them)"
        if module.host:  # the tests' build for the host
            return None if device.type == "cpu" else "built for the host"
        if device.type != "cuda":
            return "needs a GPU"
        major, minor = torch.cuda.get_device_capability(device)
        if not module.compiled_for(major, minor):
            return f"not compiled for sm_{major}{minor} (FASTRLHF_CUDA_ARCHS: {module.architectures})"
        return None
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1" and not _recorded:
        return "needs a GPU, or TRITON_INTERPRET=1"
    if device.type not in ("cpu", "cuda"):
        return "needs a GPU"
    return None


def _refuse_float64(op: str, backend: str) -> None:
    raise TypeError(f"{op}: backend '{backend}' computes in float32, got torch.float64; backends 'cpu' and 'reference' take it")


def raw_stream(t: Tensor) -> int:
    """The CUDA stream that work on t joins."""
    return int(torch._C._cuda_getCurrentRawStream(t.device.index)) if t.is_cuda else 0


_counters: dict[tuple[int, int], Tensor] = {}


def counter(like: Tensor) -> Tensor:
    """An int32 zero on the device, by which the blocks of a launch find out which of them is the last; kernels leave it at 0.
    Launches of one stream follow each other and share one; what a graph captures may run beside them and gets its own."""
    if not like.is_cuda or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=like.device)
    key = (like.device.index, raw_stream(like))
    if key not in _counters:
        _counters[key] = torch.zeros(1, dtype=torch.int32, device=like.device)
    return _counters[key]


UNIT, SHORT_UNIT, SHORT = 4096, 1024, 512 * 1024  # tokens of one partial sum; where rows do not matter, of fewer than SHORT


def workspace(shape: RowShape, like: Tensor) -> Tensor:
    """Room for the partial sums of a launch over the rows of `shape`: 24 doubles for each unit of each row or of all tokens."""
    count, length, _, total = shape
    units = total // UNIT + count if length == 0 else count * -(-length // UNIT)
    size = total if length == 0 else count * length
    if size < SHORT:
        units = max(units, -(-size // SHORT_UNIT))
    return like.new_empty(24 * (units + 1), dtype=_FLOAT64)


threads = torch.get_num_threads  # the kernels use as many as torch does


def result_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where an input is, float32 otherwise."""
    for t in tensors:
        if t is not None and t.dtype is _FLOAT64:
            return _FLOAT64
    return _FLOAT32


def result_dtype_on(op: str, backend: str, *tensors: Tensor | None) -> torch.dtype:
    """`result_dtype`, where the backend can compute it."""
    dtype = result_dtype(*tensors)
    if dtype is _FLOAT64 and backend != "cpu":
        _refuse_float64(op, backend)
    return dtype


def empty(shape: Sequence[int], dtype: torch.dtype, on: Tensor) -> Tensor:
    """Memory for a kernel to write, on a tensor's device and of this dtype, whatever torch's defaults are. On the CPU a
    template's `new_empty` of sizes, not of a shape, takes half the time of `torch.empty`."""
    if not on.is_cpu:
        return torch.empty(shape, dtype=dtype, device=on.device)
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
        return _huge(t) if t.numel() > _LARGE and t.is_cpu else t
    return empty(like.shape, dtype, like)


def empties(like: Tensor, dtype: torch.dtype, *wanted: bool) -> list[Any]:
    """`empty_as` for several outputs; None for those not wanted."""
    if like.dtype is dtype and like.numel() <= _LARGE and like.is_contiguous():
        return [torch.empty_like(like) if w else None for w in wanted]
    return [empty_as(like, dtype) if w else None for w in wanted]


def empty_scalar(dtype: torch.dtype, on: Tensor) -> Tensor:
    return torch.empty_like(_TEMPLATES[dtype]) if on.is_cpu else torch.empty((), dtype=dtype, device=on.device)


def empty_stats(names: tuple[str, ...], on: Tensor) -> Tensor:
    """A loss's statistics."""
    return empty((len(names),), _FLOAT32, on)


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


RowShape = tuple[int, int, int, int]  # rows, length, address of cu_seqlens, tokens of a pack


def row_shape(t: Tensor, cu_seqlens: Tensor | None = None) -> RowShape:
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
