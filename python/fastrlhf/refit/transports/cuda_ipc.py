"""Two processes on one GPU: the trainer exports its own memory once, and the engine copies slices of it straight into its
parameters, all of them in one launch. One copy, no staging.

Tested with memory of one process in the GPU's place; not yet measured on a GPU.
"""

from __future__ import annotations

import base64
import importlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..catalogue import Catalogue, Ints, PlanError, from_message, to_message
from ..host import Attempt, Host, Visit, answered
from ..memory import Bound, Places, copies
from ..plan import make_plan
from ..session import Transfer
from ..states import RefitError, Weights
from ..wire import Channel, Message

TILE = 64 << 10  # bytes that a block of the copy kernel moves


class Device(Protocol):
    """What the transport needs of a GPU; `Gpu` is it, the tests have one on the CPU."""

    def export(self, address: int) -> tuple[bytes, int, int]:
        """(handle of the allocation, offset of the address in it, bytes of the allocation)."""

    def open(self, handle: bytes) -> int:
        """Where another process's allocation lies here."""

    def close(self, base: int) -> None: ...

    def event(self) -> tuple[int, bytes]: ...

    def open_event(self, handle: bytes) -> int: ...

    def close_event(self, event: int) -> None: ...

    def record(self, event: int) -> None:
        """After everything that this process has asked of the device on the current stream."""

    def wait(self, event: int) -> None:
        """The copies come after it."""

    def table(self, table: Ints) -> Any:
        """Copies in the form that `run` takes, made once."""

    def run(self, table: Any) -> None:
        """The copies; they have taken place when this returns."""

    def synchronize(self) -> None:
        """Until everything that this process has asked of the device on the current stream is done."""


class CudaIpc:
    """The `Target` of a trainer rank whose engine rank lies on the same GPU.

    Args:
        tensors: this rank's parameters by name. Where one has moved all are exported again, at the next transfer.
    """

    atomic = False

    def __init__(
        self, channel: Channel, source: Catalogue, tensors: Mapping[str, Tensor], device: Device | None = None, *,
        rank: int = 0, ignore: frozenset[str] = frozenset(), timeout: float = 60.0,
    ) -> None:  # fmt: skip
        self.channel, self.rank, self.timeout = channel, rank, timeout
        self.device = device or Gpu(next(iter(tensors.values())).device)
        self._ask({"kind": "hello", "rank": rank}, timeout)  # an engine that is there
        hello = self._ask({"kind": "catalogue"}, timeout)
        self.plan = make_plan(source, from_message(hello["catalogue"]), ignore=ignore)
        self.epoch = int(hello["epoch"])
        self.version = int(hello["version"]) if int(hello["version"]) >= 0 else None
        self._ask({"kind": "plan", "source": to_message(source), "digest": self.plan.digest, "ignore": sorted(ignore)}, timeout)
        self.nbytes = int(self.plan.nbytes[self.plan.between(rank, int(hello["rank"]))].sum())
        self._tensors, self._seconds, self._written = dict(tensors), timeout, False
        with ExitStack() as stack:
            self._event, handle = self.device.event()
            stack.callback(self.device.close_event, self._event)
            self._event_text = base64.b64encode(handle).decode()
            self._bound = Bound(source, rank, self._tensors, self._export)
            self._closes = stack.pop_all()

    def _export(self, places: Places) -> None:
        """Handles of the allocations that the parameters lie in."""
        tensors: dict[str, list[Any]] = {}
        allocations: list[tuple[str, int]] = []
        number: dict[bytes, int] = {}
        for i, name in places.catalogue.of_rank(self.rank):
            t = self._tensors[name]
            handle, offset, nbytes = self.device.export(int(places.address[i]))
            if handle not in number:
                number[handle] = len(allocations)
                allocations.append((base64.b64encode(handle).decode(), nbytes))
            dtype = str(t.dtype).removeprefix("torch.")
            tensors[name] = [number[handle], offset, list(t.shape), list(t.stride()), dtype]
        message: Message = {"kind": "export", "rank": self.rank, "event": self._event_text}
        message |= {"allocations": allocations, "tensors": tensors}
        self._ask(message, self._seconds)

    def begin(self, epoch: int, version: int, mode: str, timeout: float) -> None:
        self._seconds, self._written = timeout, False
        message = {"kind": "begin", "epoch": epoch, "version": version, "mode": mode, "timeout": timeout}
        self._ask(message if self.rank == 0 else {"kind": "join", "after": epoch - 1, "timeout": timeout}, timeout + 2)

    def transfer(self, epoch: int) -> Transfer:
        self._bound.refresh()
        self._written = True
        self.device.record(self._event)  # the weights are there when the stream has come this far
        self._ask({"kind": "pull", "epoch": epoch, "rank": self.rank}, self._seconds)
        return Transfer(self.nbytes, 1)

    def commit(self, epoch: int, version: int) -> None:
        kind = "outcome" if self.rank else "commit"
        self._ask({"kind": kind, "epoch": epoch, "timeout": self._seconds}, self._seconds + 2)

    def fail(self, epoch: int, reason: str) -> None:
        self._ask({"kind": "fail", "epoch": epoch, "reason": reason, "written": self._written}, self.timeout)

    def close(self) -> None:
        self.channel.close()
        self._closes.close()

    def _ask(self, message: Message, timeout: float) -> Message:
        return answered(self.channel.ask(message, timeout))


@dataclass
class _Export:
    """What a connection's trainer rank has exported: its event, the copies out of its memory for each slot, and what is open
    for them."""

    event: int
    tables: list[Any]
    close: Callable[[], None]


class CudaIpcHost(Host):
    """The engine's side.

    Args:
        slots: the engine's parameters by name, for each slot.
    """

    def __init__(
        self, dest: Catalogue, weights: Weights, slots: list[Mapping[str, Tensor]], device: Device | None = None, *,
        rank: int = 0, **more: Any,
    ) -> None:  # fmt: skip
        if len(slots) != weights.slots:
            raise PlanError(f"slots: expected {weights.slots}, got {len(slots)}")
        self._tensors = [dict(s) for s in slots]
        self.device = device or Gpu(next(iter(self._tensors[0].values())).device)
        super().__init__(dest, weights, None, rank=rank, **more)
        self._exports: dict[Visit, _Export] = {}

    def _lay(self) -> tuple[list[Places], int]:
        return [Places.of_tensors(self.dest, self.rank, s) for s in self._tensors], 0

    def _answer(self, visit: Visit, message: Message) -> tuple[Message, tuple[int, ...]]:
        if message["kind"] == "hello":  # there is no arena to hand over
            return {}, ()
        return super()._answer(visit, message)

    def _answers(self, visit: Visit, message: Message, kind: str) -> Message:
        if kind == "catalogue":
            w = self.weights
            return {"catalogue": to_message(self.dest), "rank": self.rank, "epoch": w.epoch, "version": w.version}
        if kind == "plan":
            self._closed(visit)  # its copies are of the plan before
        if kind == "export":
            self._closed(visit)
            self._exports[visit] = self._open(visit, message)
            return {}
        if kind == "pull":
            self._pull(self._own(visit, message), int(message["rank"]), self._exports.get(visit))
            self._leave(visit)
            return {}
        return super()._answers(visit, message, kind)

    def _closed(self, visit: Visit) -> None:
        # in the connection's own thread, like its pulls: none of them is under way
        if (export := self._exports.pop(visit, None)) is not None:
            export.close()

    def _open(self, visit: Visit, message: Message) -> _Export:
        if visit.plan is None:
            raise RefitError("plan: none has been agreed on")
        plan, rank, device = visit.plan, int(message["rank"]), self.device
        with ExitStack() as stack:
            bases = []
            for text, _ in message["allocations"]:
                bases.append(device.open(base64.b64decode(text)))
                stack.callback(device.close, bases[-1])
            event = device.open_event(base64.b64decode(message["event"]))
            stack.callback(device.close_event, event)
            places = Places(plan.source, rank)
            for i, name in plan.source.of_rank(rank):
                number, offset, shape, stride, dtype = message["tensors"][name]
                like = torch.empty_strided(shape, stride, dtype=getattr(torch, dtype), device="meta")
                places.put(i, like, bases[number] + offset)
                extent, nbytes = like.untyped_storage().nbytes(), message["allocations"][number][1]
                if not 0 <= offset <= nbytes - extent:
                    raise PlanError(f"{name}: {extent} bytes from {offset} on are not within its allocation of {nbytes}")
            ops = plan.between(rank, self.rank)
            tables = [device.table(copies(plan, ops, places, dest)) for dest in self._places]
            return _Export(event, tables, stack.pop_all().close)

    def _pull(self, attempt: Attempt, rank: int, export: _Export | None) -> None:
        if export is None:
            raise RefitError(f"export: rank {rank} has not exported its memory")
        self.weights.current(attempt.epoch)
        self.device.wait(export.event)
        self.device.run(export.tables[attempt.slot])
        self._count(attempt, rank)  # a copy that took too long does not count

    def _fill_pads(self, slot: int) -> None:
        for param, row, col, rows, cols in self.dest.pads.tolist():
            if self.dest.params.rank[param] == self.rank:
                shape = self.dest.params.shape[param].tolist()
                self._tensors[slot][self.dest.params.names[param]].detach().view(shape)[row : row + rows, col : col + cols] = 0
        self.device.synchronize()

    def checksums(self) -> dict[str, int]:
        raise RefitError("checksums: not of memory on a GPU")


def tiles(table: Ints) -> Ints:
    """(n, 5) for the copy kernel: copy, first row, rows, first byte, bytes; none larger than TILE unless a row's piece is."""
    rows, width = table[:, 2], table[:, 3]
    pieces = np.where(width > TILE, -(-width // TILE), 1)
    height = np.where(width > TILE, 1, np.maximum(1, TILE // np.maximum(width, 1)))
    bands = -(-rows // height)
    count = np.where(width > 0, bands * pieces, 0)
    copy = np.repeat(np.arange(len(table)), count)
    within = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
    band, piece = within // pieces[copy], within % pieces[copy]
    first = band * height[copy]
    at = piece * TILE
    nbytes = np.where(pieces[copy] > 1, np.minimum(TILE, width[copy] - at), width[copy])
    return np.stack([copy, first, np.minimum(height[copy], rows[copy] - first), at, nbytes], 1)


def run_on_device(table: Ints, device: torch.device, stream: Any = None) -> None:
    """A table of copies on a GPU, on `stream` or the current one."""
    gpu = Gpu(device)
    gpu.launch(gpu.table(table), stream or torch.cuda.current_stream(device))


class Gpu:
    """`Device` by the CUDA extension."""

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise RefitError(f"cuda_ipc: expected parameters on a GPU, got {device}")
        try:
            self._cuda: Any = importlib.import_module("fastrlhf._cuda")
        except ImportError as error:
            raise RefitError(f"cuda_ipc: the CUDA extension is not built here ({error}); FASTRLHF_CUDA=on builds it") from error
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def _call(self, name: str, *args: Any) -> Any:
        with torch.cuda.device(self.device):  # handles, and streams by number 0, are of the current device
            return getattr(self._cuda, name)(*args)

    def export(self, address: int) -> tuple[bytes, int, int]:
        return self._call("ipc_export", address)

    def open(self, handle: bytes) -> int:
        return int(self._call("ipc_open", handle))

    def close(self, base: int) -> None:
        self._call("ipc_close", base)

    def event(self) -> tuple[int, bytes]:
        return self._call("ipc_event")

    def open_event(self, handle: bytes) -> int:
        return int(self._call("ipc_open_event", handle))

    def close_event(self, event: int) -> None:
        self._call("close_event", event)

    def record(self, event: int) -> None:
        self._call("record_event", event, torch.cuda.current_stream(self.device).cuda_stream)

    def wait(self, event: int) -> None:
        self._call("wait_event", event, self._stream.cuda_stream)

    def table(self, table: Ints) -> Any:
        made = [torch.from_numpy(np.ascontiguousarray(t)).to(self.device) for t in (table, tiles(table))]
        self.synchronize()
        return made

    def launch(self, table: Any, stream: Any) -> None:
        rows, cut = table
        self._call("run_copies", rows.data_ptr(), cut.data_ptr(), cut.shape[0], stream.cuda_stream)
        for t in table:
            t.record_stream(stream)  # the caller may drop it before the kernel has read it

    def run(self, table: Any) -> None:
        self.launch(table, self._stream)
        self._stream.synchronize()

    def synchronize(self) -> None:
        torch.cuda.current_stream(self.device).synchronize()
