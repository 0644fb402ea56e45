"""Bare TensorRT engines, by `Refitter`: the path of TensorRT-LLM before 1.3.

Weights lie in one buffer of ours, whose addresses are given to the refitter once; a refit copies into the buffer, by plan, and
asks for one asynchronous refit. Checked against the recorded contract only (`contracts/tensorrt.json`); never run here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .catalogue import DTYPES, Catalogue, PlanError
from .memory import ALIGN, Bound, Places, copies, run
from .plan import make_plan
from .session import Transfer
from .states import RefitError

_NAMES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "float8_e4m3fn": "FP8", "int8": "INT8", "int32": "INT32"}


class RefitterTarget:
    """
    Args:
        trt: the module `tensorrt`.
        refitter: a `trt.Refitter` of the engine, built with BuilderFlag.REFIT.
        dest: what the engine holds; parameters are named as its weights are, [Q | K | V] fused as TensorRT-LLM builds them.
        source, tensors: the trainer's; on the CPU, or all on the engine's device.
        context: whatever must be idle before a refit, called with no arguments: a refit under pending work is undefined.

    Raises:
        RefitError: a weight that the engine does not know, of another count or dtype, or that it refuses; weights of the engine
            that nobody gives.
    """

    atomic = False  # a refit that answers false may have replaced some

    def __init__(
        self, trt: Any, refitter: Any, source: Catalogue, tensors: Mapping[str, Tensor], dest: Catalogue, *, rank: int = 0,
        stream: Any = None, context: Any = None,
    ) -> None:  # fmt: skip
        self.refitter, self.plan = refitter, make_plan(source, dest)
        self.stream, self._idle = stream, context or (lambda: None)
        device = next(iter(tensors.values())).device
        if device.type == "cuda" and stream is None:
            self.stream = torch.cuda.Stream(device)
        _, size = Places.in_arena(dest, rank, 0)
        self.buffer = torch.zeros(size + ALIGN, dtype=torch.uint8, device=device)
        base = -(-self.buffer.data_ptr() // ALIGN) * ALIGN
        self._places, _ = Places.in_arena(dest, rank, base)
        self._ops = self.plan.between(dest=rank)
        if len(set(self.plan.source_rank[self._ops].tolist())) > 1:
            raise PlanError("source: expected one rank that holds all; gather first")
        self._bound = Bound(source, 0, tensors, self._bind)
        self.nbytes = int(self.plan.nbytes[self._ops].sum())
        location = trt.TensorLocation.DEVICE if device.type == "cuda" else trt.TensorLocation.HOST
        self._give(trt, dest, rank, location)

    def _bind(self, places: Places) -> None:
        self._table = copies(self.plan, self._ops, places, self._places)

    def _give(self, trt: Any, dest: Catalogue, rank: int, location: Any) -> None:
        known = set(self.refitter.get_all_weights())
        mine = {name for _, name in dest.of_rank(rank)}
        if mine != known:
            one = min(mine ^ known)
            raise RefitError(f"{one}: {'the engine has no such weight' if one in mine else 'nobody gives it'}")
        for i, name in dest.of_rank(rank):
            count, dtype = int(dest.params.shape[i].prod()), getattr(trt.DataType, _NAMES[DTYPES[dest.params.dtype[i]]])
            prototype = self.refitter.get_weights_prototype(name)
            if prototype.size != count or prototype.dtype != dtype:
                raise RefitError(f"{name}: the engine's has {prototype.size} of {prototype.dtype}, given {count} of {dtype}")
            weights = trt.Weights(dtype, int(self._places.address[i]), count)
            if not self.refitter.set_named_weights(name, weights, location):
                raise RefitError(f"{name}: the engine refused it")

    def begin(self, epoch: int, version: int, mode: str, timeout: float) -> None:
        self._idle()

    def transfer(self, epoch: int) -> Transfer:
        self._bound.refresh()
        if self.buffer.is_cuda:
            from .transports.cuda_ipc import run_on_device

            run_on_device(self._table, self.buffer.device, self.stream)
        else:
            run(self._table, threads=torch.get_num_threads())
        return Transfer(self.nbytes, 1)

    def commit(self, epoch: int, version: int) -> None:
        if missing := list(self.refitter.get_missing_weights()):
            raise RefitError(f"{missing[0]}: the engine waits for it still ({len(missing)} in all)")
        if not self.refitter.refit_cuda_engine_async(self.stream.cuda_stream if self.stream is not None else 0):
            raise RefitError("TensorRT: the refit answered false: some weights may have been replaced")
        if self.stream is not None:
            self.stream.synchronize()

    def fail(self, epoch: int, reason: str) -> None:
        """Nothing can be taken back."""

    def close(self) -> None:
        pass
