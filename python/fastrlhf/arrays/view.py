"""Memory of any array library: pointer, dtype, shape and strides, read from NumPy's interface or from a DLPack capsule."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np

FLOATS = ("float32", "bfloat16", "float16", "float64")
INTEGERS = ("int32", "int64")
MASKS = ("bool", "uint8", *INTEGERS, *FLOATS)
CODES = {"float32": 0, "bfloat16": 1, "float16": 2, "float64": 3, "int32": 4, "int64": 5, "uint8": 6, "bool": 6}
CPU, CUDA, CUDA_HOST, MANAGED = 1, 2, 3, 13
_DLPACK_TYPES = {
    (0, 32): "int32", (0, 64): "int64", (1, 8): "uint8", (2, 16): "float16", (2, 32): "float32", (2, 64): "float64",
    (4, 16): "bfloat16", (6, 8): "bool",
}  # fmt: skip


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32), ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class View(NamedTuple):
    """An array's memory; `owner` keeps it alive. Strides are in elements."""

    pointer: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    device: int
    owner: Any

    @property
    def size(self) -> int:
        count = 1
        for n in self.shape:
            count *= n
        return count

    @property
    def contiguous(self) -> bool:
        return self.size == 0 or all(s == t for s, t, n in zip(self.strides, dense(self.shape), self.shape) if n > 1)


def dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of rows one after another."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def view(name: str, x: Any, dtypes: tuple[str, ...]) -> View:
    """Of an argument. Raises TypeError for what is no array or has another dtype."""
    if isinstance(x, np.ndarray):
        found = _of_numpy(x)
    elif hasattr(x, "__dlpack__"):
        found = _of_dlpack(name, x)
    elif isinstance(x, list | tuple | float | int | np.generic):
        found = _of_numpy(np.asarray(x))
    else:
        raise TypeError(f"{name}: expected an array with __dlpack__, got {type(x).__name__}")
    if found.dtype not in dtypes:
        raise TypeError(f"{name}: expected one of {', '.join(dtypes)}, got {found.dtype}")
    return found


def _of_numpy(x: np.ndarray[Any, Any]) -> View:
    if not x.dtype.isnative:
        x = x.astype(x.dtype.newbyteorder("="))
    size = max(x.itemsize, 1)
    if any(s % size for s in x.strides):
        x = np.ascontiguousarray(x)
    strides = tuple(s // size for s in x.strides)
    return View(x.__array_interface__["data"][0], x.dtype.name, x.shape, strides, CPU, x)


def _of_dlpack(name: str, x: Any) -> View:
    on_gpu = x.__dlpack_device__()[0] in (CUDA, MANAGED)
    capsule = x.__dlpack__(stream=1) if on_gpu else x.__dlpack__()  # 1: CUDA's default stream, which the kernels join
    t = ctypes.cast(_pointer_of(capsule, b"dltensor"), ctypes.POINTER(_DLTensor)).contents
    if t.device_type not in (CPU, CUDA, CUDA_HOST, MANAGED):
        raise ValueError(f"{name}: memory of DLPack device {t.device_type} cannot be used; on the CPU or a CUDA device it can")
    dtype = _DLPACK_TYPES.get((t.code, t.bits), f"DLPack type ({t.code}, {t.bits})") if t.lanes == 1 else "a vector type"
    shape = tuple(t.shape[i] for i in range(t.ndim))
    strides = tuple(t.strides[i] for i in range(t.ndim)) if t.strides else dense(shape)
    device = CUDA if t.device_type in (CUDA, MANAGED) else CPU
    return View((t.data or 0) + t.byte_offset, dtype, shape, strides, device, capsule)


def give_back(like: Any, out: Any) -> Any:
    """A result as an array of the library that an argument came from."""
    if isinstance(like, np.ndarray) or not hasattr(like, "__array_namespace__") or not isinstance(out, np.ndarray):
        return out
    library = like.__array_namespace__()
    try:
        return library.from_dlpack(out)
    except Exception:  # a library that wants other alignment copies
        return library.asarray(out)
