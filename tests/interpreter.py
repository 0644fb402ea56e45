"""What Triton 3.6's interpreter does otherwise than a GPU, put right for the tests: it truncates float32 to bfloat16, multiplies
matrices of bfloat16 by their bits, under numpy 2.4 takes no loop bound from a tensor, scans an element at a time, looks
through all of `triton.language` for what to replace at each call of a device function, describes in text the type of every
value that comes by, makes those types anew for each of them, and computes integers again in 64 bits for an assertion that it
then does not make."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
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


BLOCK_TYPES: dict[tuple[int, tuple[int, ...]], tl.block_type] = {}


def _block_type(cls: type, element_ty: Any, shape: Any) -> tl.block_type:
    """One object a type: those that are equal are the same, and what depends on a type is found out once."""
    if type(shape) is not tl.core.tuple or any(type(n) is not int for n in shape.values):
        shape = tl.core.tuple(tl.core._unwrap_shape(shape))
    shape = tuple(shape.values)
    key = (id(element_ty), shape)  # the type keeps its element type, so that no other takes its address
    if (known := BLOCK_TYPES.get(key)) is None:
        known = BLOCK_TYPES[key] = object.__new__(cls)
        known.element_ty = element_ty
        known.shape = tl.core.tuple(shape)
        known.numel = tl.core.validate_block_shape(shape)
        known.of_tensors = (tl.core.tuple([tl.constexpr(n) for n in shape]), tl.constexpr(known.numel), element_ty)
    return known


def _make_tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle, self.type = handle, type
    self.shape, self.numel, self.dtype = (
        type.of_tensors if type.is_block() else (tl.core.tuple([]), tl.constexpr(1), type.scalar)
    )


CONSTANTS: dict[tuple[int, str], tl.tensor] = {}
_broadcast_different = TritonSemantic.broadcast_impl_value
_check_different = TritonSemantic.binary_op_type_checking_impl


def _broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
    return (lhs, rhs) if lhs.type is rhs.type else _broadcast_different(self, lhs, rhs)


def _is_constant_of(type: Any, x: Any) -> bool:
    if not type.is_block():
        return False
    if type.element_ty is tl.float32:
        return x.__class__ in (int, float)
    return x.__class__ is int and type.element_ty in (tl.int32, tl.int64) and -(2**31) <= x < 2**31


def _constant(self: Any, type: Any, x: Any) -> tl.tensor:
    key = id(type), repr(x)  # 0.0 is not -0.0
    if (known := CONSTANTS.get(key)) is None:
        one = self.scalar_constant(x, type.element_ty)
        known = CONSTANTS[key] = tl.tensor(self.builder.create_splat(type.to_ir(self.builder), one.handle), type)
        known.handle.data.flags.writeable = False
    return known


def _check(self: Any, lhs: Any, rhs: Any, *arguments: Any, **named: Any) -> Any:
    """Two of one type are what they have to be; halves may be divided as float32."""
    same = isinstance(lhs, tl.tensor) and isinstance(rhs, tl.tensor) and lhs.type is rhs.type
    if same and (lhs.dtype is tl.float32 or lhs.dtype.is_int()):
        return lhs, rhs
    if isinstance(lhs, tl.tensor) and _is_constant_of(lhs.type, rhs):
        return lhs, _constant(self, lhs.type, rhs)
    if isinstance(rhs, tl.tensor) and _is_constant_of(rhs.type, lhs):
        return _constant(self, rhs.type, lhs), rhs
    return _check_different(self, lhs, rhs, *arguments, **named)


_equal_by_name = tl.dtype.__eq__


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
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )
    tl.block_type.__new__ = _block_type
    tl.block_type.__init__ = lambda self, element_ty, shape: None
    tl.block_type.__eq__ = lambda self, other: (
        self is other
        or (isinstance(other, tl.block_type) and self.element_ty == other.element_ty and self.shape == other.shape)
    )
    tl.dtype.__eq__ = lambda self, other: self is other or _equal_by_name(self, other)
    tl.tensor.__init__ = _make_tensor
    TritonSemantic.broadcast_impl_value = _broadcast
    TritonSemantic.binary_op_type_checking_impl = _check
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
