"""What Triton 3.6's interpreter does otherwise than a GPU, put right for the tests: it truncates float32 to bfloat16, multiplies
matrices of bfloat16 by their bits, under numpy 2.4 takes no loop bound from a tensor, scans an element at a time, looks
through all of `triton.language` for what to replace at each call of a device function, and describes in text the type of every
value that comes by."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _cast(self: Any, source: Any, target_type: Any) -> Any:
    source_type, target_type = source.dtype.scalar, target_type.scalar
    data = source.data
    if source_type == tl.bfloat16 and target_type != tl.bfloat16:
        data = (data.astype(np.uint32) << 16).view(np.float32)
    if target_type == tl.bfloat16 and source_type != tl.bfloat16:
        single = data.astype(np.float32)
        bits = single.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        data = np.where(np.isnan(single), 0x7FC0, rounded)
    return interpreter.TensorHandle(data.astype(interpreter._get_np_dtype(target_type)), target_type)


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    a, b = (_cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return interpreter.TensorHandle(np.matmul(a.data, b.data, dtype=d.data.dtype) + d.data, d.dtype.scalar)


def _scan(self: Any, inputs: Any) -> list[Any]:
    """In log2(n) steps of all elements at once, as a GPU does."""
    data = [x.handle.data for x in inputs]
    types = [x.dtype for x in inputs]
    size = data[0].shape[self.axis]
    shape = [1] * data[0].ndim
    shape[self.axis] = size
    i = np.arange(size).reshape(shape)
    step = 1
    while step < size:
        left = [self.to_tensor(np.roll(d, step, self.axis), t) for d, t in zip(data, types, strict=True)]
        both = self.combine_fn.fn(*left, *(self.to_tensor(d, t) for d, t in zip(data, types, strict=True)))
        both = both if isinstance(both, tuple) else (both,)
        data = [np.where(i >= step, new.handle.data, old) for new, old in zip(both, data, strict=True)]
        step *= 2
    return [self.to_tensor(d, t) for d, t in zip(data, types, strict=True)]


@functools.cache
def _builtins(package: Any) -> list[tuple[str, Any]]:
    return [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    for name, member in _builtins(package):
        interpreter._patch_attr(package, name, member, builder, scope)


_patch_known = interpreter._patch_lang  # what the globals of a function know of the language


def _patch_lang(fn: Any) -> Any:
    """For a launch and every device function in it, also those of triton.language itself, which know `core` alone."""
    return _patch_known(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))


def _call(self: Any, *arguments: Any, **named: Any) -> Any:
    """Of a device function: the launch that it is called in has replaced the language's functions already."""
    return self.rewrite()(*arguments, **named)


NUMPY_TYPES = {
    t: interpreter._get_np_dtype(t)
    for t in (
        tl.int1, tl.int8, tl.int16, tl.int32, tl.int64, tl.uint8, tl.uint16, tl.uint32, tl.uint64, tl.float16, tl.bfloat16,
        tl.float32, tl.float64,
    )
}  # fmt: skip


def _numpy_type(t: Any) -> Any:
    return np.dtype(np.uint64) if isinstance(t.scalar, tl.pointer_type) else NUMPY_TYPES[t.scalar]


def _make_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    self.element_ty = element_ty
    self.shape = tl.core.tuple(tl.core._unwrap_shape(shape))
    self.numel = tl.core.validate_block_shape(self.shape)


def _make_tuple(self: Any, args: Any, type: Any = None) -> None:
    self.values = list(args)
    if type is not None:
        self.type = type if isinstance(type, tl.core.tuple_type) else tl.core.tuple_type(type)


_type_of_tuple = functools.cached_property(lambda self: tl.core._type_for_tuple_values(self.values))


@functools.cache
def repair() -> None:
    interpreter.InterpreterBuilder.cast_impl = _cast
    interpreter.InterpreterBuilder.create_dot = _dot
    interpreter.ScanOps.generic_scan = _scan
    interpreter._get_np_dtype = _numpy_type
    tl.block_type.__init__ = _make_block_type
    tl.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>")
    tl.core.tuple.__init__ = _make_tuple
    tl.core.tuple.type = _type_of_tuple
    _type_of_tuple.__set_name__(tl.core.tuple, "type")
    interpreter._patch_builtin = _patch_builtin
    interpreter._patch_lang = _patch_lang
    interpreter.InterpretedFunction.__call__ = _call
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
