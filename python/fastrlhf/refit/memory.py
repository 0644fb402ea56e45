"""A plan's copies with addresses: what the copy engine takes."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .catalogue import DTYPES, Catalogue, Ints, PlanError, sizes
from .plan import Plan

ALIGN = 512  # bytes between parameters of an arena: what every engine's kernels ask for, and more than a cache line


@functools.cache
def _cpu() -> Any:
    return importlib.import_module("fastrlhf._cpu")  # untyped, and not needed by who only plans


def shared_memory(nbytes: int, fd: int | None = None) -> Any:
    """Memory for several processes: new, or that of a descriptor, which is taken over. It has no name that could stay behind;
    `fd` is how others get it, and torch.frombuffer reads it.

    Raises:
        RuntimeError: so much cannot be had. ValueError: the descriptor's is smaller.
    """
    return _cpu().Arena(nbytes) if fd is None else _cpu().Arena(fd, nbytes)


def checksum(address: int, nbytes: int) -> int:
    """XXH3-64 of bytes."""
    return int(_cpu().xxh3(address, nbytes))


class Places:
    """Where each parameter of one rank lies: its address, and the bytes from one row to the next."""

    def __init__(self, catalogue: Catalogue, rank: int) -> None:
        self.catalogue, self.rank = catalogue, rank
        self.address = np.zeros(len(catalogue.params), np.int64)
        self.pitch = catalogue.params.shape[:, 1] * sizes(catalogue.params.dtype)

    @staticmethod
    def of_tensors(catalogue: Catalogue, rank: int, tensors: Mapping[str, Tensor]) -> Places:
        """Of live tensors by parameter name.

        Raises:
            PlanError: one is missing, has another shape or dtype, or its rows are not contiguous.
        """
        out = Places(catalogue, rank)
        for i, name in catalogue.of_rank(rank):
            if name not in tensors:
                raise PlanError(f"{name}: rank {rank} has no such tensor")
            out.put(i, tensors[name], tensors[name].data_ptr())
        return out

    def put(self, i: int, t: Tensor, address: int) -> None:
        """Parameter i lies at an address as `t` does; what `t` holds is not looked at.

        Raises:
            PlanError: as `of_tensors`.
        """
        params = self.catalogue.params
        name, shape, dtype = params.names[i], params.shape[i].tolist(), DTYPES[params.dtype[i]]
        rows, cols = matrix_of(t)
        if [rows, cols] != shape or t.dtype is not getattr(torch, dtype):
            raise PlanError(f"{name}: expected {tuple(shape)} elements of {dtype}, got a tensor {tuple(t.shape)} of {t.dtype}")
        if (cols > 1 and t.stride(-1) != 1) or (t.dim() > 2 and not t.is_contiguous()):
            raise PlanError(f"{name}: expected contiguous rows, got strides {t.stride()}")
        self.address[i] = address
        if t.dim() in (1, 2):
            self.pitch[i] = t.stride(0) * t.dtype.itemsize

    @staticmethod
    def in_arena(catalogue: Catalogue, rank: int, base: int) -> tuple[Places, int]:
        """One parameter after another from `base` on; and how many bytes they take."""
        out, at = Places(catalogue, rank), 0
        nbytes = catalogue.params.nbytes
        for i, _ in catalogue.of_rank(rank):
            out.address[i] = base + at
            at += -(-int(nbytes[i]) // ALIGN) * ALIGN
        return out, max(at, ALIGN)


class Bound:
    """One rank's live tensors, and what `bind` made of where they lie: at once, and again at a `refresh` after one has moved.

    Raises:
        PlanError: as `Places.of_tensors`.
    """

    def __init__(
        self, catalogue: Catalogue, rank: int, tensors: Mapping[str, Tensor], bind: Callable[[Places], None]
    ) -> None:  # fmt: skip
        self.catalogue, self.rank, self.tensors = catalogue, rank, dict(tensors)
        self._bind = bind
        self._seen: list[object] = []
        self.refresh()

    def refresh(self) -> None:
        found: list[object] = [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in self.tensors.values()]
        if found != self._seen:
            self._bind(Places.of_tensors(self.catalogue, self.rank, self.tensors))
            self._seen = found


def matrix_of(t: Tensor) -> tuple[int, int]:
    """(rows, cols) of a tensor as catalogues count: the last dimension is the columns, a vector has one."""
    if t.dim() <= 1:
        return t.numel(), 1
    return t.numel() // t.shape[-1], t.shape[-1]


def copies(plan: Plan, ops: Ints, source: Places | None, dest: Places | None) -> Ints:
    """(n, 6) for `_cpu.run_copies`: source, destination, rows, bytes of a row, pitches. A side that is None has address 0.

    What is contiguous on both sides is one row, whichever side is given: hashes of both sides then are of the same pieces.
    """
    table = plan.ops[ops]
    size = sizes(plan.dest.params.dtype[table[:, 3]])
    rows, width = table[:, 6], table[:, 7] * size
    out = np.zeros((len(table), 6), np.int64)
    for side, catalogue, places, param, row, col in (
        (0, plan.source, source, 0, 1, 2), (1, plan.dest, dest, 3, 4, 5),
    ):  # fmt: skip
        number = table[:, param]
        whole = catalogue.params.shape[number, 1] * size
        pitch = places.pitch[number] if places is not None else whole
        out[:, 4 + side] = pitch
        if places is not None:
            out[:, side] = places.address[number] + table[:, row] * pitch + table[:, col] * size
    flat = (plan.source.params.shape[table[:, 0], 1] == table[:, 7]) & (plan.dest.params.shape[table[:, 3], 1] == table[:, 7])
    dense = flat & (out[:, 4] == width) & (out[:, 5] == width)
    if (flat & ~dense).any():
        raise PlanError("copies: a parameter whose rows are not contiguous cannot be refitted; make it contiguous first")
    out[:, 2] = np.where(dense, 1, rows)
    out[:, 3] = np.where(dense, rows * width, width)
    return np.ascontiguousarray(out)


def run(table: Ints, *, hashes: bool = False, threads: int = 1) -> np.ndarray | None:
    """The copies; with `hashes` one uint64 for each. What has no destination is only hashed."""
    out = np.zeros(len(table), np.uint64) if hashes else None
    if len(table):
        _cpu().run_copies(table.ctypes.data, len(table), 0 if out is None else out.ctypes.data, threads)
    return out
