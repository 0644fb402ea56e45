"""Two processes on one GPU: the trainer exports its own memory once, and the engine copies slices of it straight into its
parameters, all of them in one launch. One copy, no staging.

Tested with memory of one process in the GPU's place; not yet measured on a GPU.
"""

from __future__ import annotations

import base64
import importlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..catalogue import Catalogue, Ints, PlanError, from_message, to_message
from ..host import Host, Visit, answered
from ..memory import Places, copies
from ..plan import make_plan
from ..session import Transfer
from ..states import RefitError, Weights
from ..wire import Channel, Message

TILE = 64 << 10  # bytes that a block of the copy kernel moves


class Device(Protocol):
    """What the transport needs of a GPU; `Gpu` is it, the tests have one on the CPU."""

    def export(self, address: int) -> tuple[bytes, int]:
        """(handle of the allocation, offset of the address in it)."""

    def open(self, handle: bytes) -> int:
        """Where another process's allocation lies here."""

    def close(self, base: int) -> None: ...

    def event(self) -> tuple[int, bytes]: ...

    def open_event(self, handle: bytes) -> int: ...

    def record(self, event: int) -> None:
        """After everything that this process has asked of the device on the current stream."""

    def wait(self, event: int) -> None:
        """The copies come after it."""

    def table(self, table: Ints) -> Any:
        """Copies in the form that `run` takes, made once."""

    def run(self, table: Any) -> None:
        """The copies; they have taken place when this returns."""


class CudaIpc:
    """The `Target` of a trainer rank whose engine rank lies on the same GPU.

    Args:
        tensors: this rank's parameters by name; they must stay where they are while the engine has them open.
    """

    atomic = False

    def __init__(
        self, channel: Channel, source: Catalogue, tensors: Mapping[str, Tensor], device: Device | None = None, *,
        rank: int = 0, ignore: frozenset[str] = frozenset(), timeout: float = 60.0,
    ) -> None:  # fmt: skip
        self.channel, self.rank, self.timeout = channel, rank, timeout
        self.tensors = dict(tensors)
        self.device = device or Gpu(next(iter(self.tensors.values())).device)
        self._ask({"kind": "hello", "rank": rank}, timeout)  # an engine that is there
        hello = self._ask({"kind": "catalogue"}, timeout)
        self.plan = make_plan(source, from_message(hello["catalogue"]), ignore=ignore)
        self.epoch = int(hello["epoch"])
        self.version = int(hello["version"]) if int(hello["version"]) >= 0 else None
        self._ask({"kind": "plan", "source": to_message(source), "digest": self.plan.digest, "ignore": sorted(ignore)}, timeout)
        self.nbytes = int(self.plan.nbytes[self.plan.between(rank, int(hello["rank"]))].sum())
        self._event, handle = self.device.event()
        self._event_text = base64.b64encode(handle).decode()
        self._exported: list[tuple[Tensor, int]] = []

    def _export(self, timeout: float) -> None:
        """Handles of the allocations that the parameters lie in; once, and again only where one has moved."""
        if self._exported and all(t.data_ptr() == at for t, at in self._exported):
            return
        places: dict[str, list[Any]] = {}
        handles: list[str] = []
        number: dict[bytes, int] = {}
        for name, t in self.tensors.items():
            handle, offset = self.device.export(t.data_ptr())
            if handle not in number:
                number[handle] = len(handles)
                handles.append(base64.b64encode(handle).decode())
            places[name] = [number[handle], offset, list(t.shape), list(t.stride())]
        self._ask({"kind": "export", "rank": self.rank, "handles": handles, "places": places}, timeout)
        self._exported = [(t, t.data_ptr()) for t in self.tensors.values()]

    def begin(self, epoch: int, version: int, mode: str, timeout: float) -> None:
        self._export(timeout)
        self._seconds = timeout
        message = {"kind": "begin", "epoch": epoch, "version": version, "mode": mode, "timeout": timeout}
        self._ask(message if self.rank == 0 else {"kind": "join", "after": epoch - 1, "timeout": timeout}, timeout + 2)

    def transfer(self, epoch: int) -> Transfer:
        self.device.record(self._event)  # the weights are there when the stream has come this far
        self._ask({"kind": "pull", "epoch": epoch, "rank": self.rank, "event": self._event_text}, self._seconds)
        return Transfer(self.nbytes, 1)

    def commit(self, epoch: int, version: int) -> None:
        kind = "outcome" if self.rank else "commit"
        self._ask({"kind": kind, "epoch": epoch, "timeout": self._seconds}, self._seconds + 2)

    def fail(self, epoch: int, reason: str) -> None:
        self._ask({"kind": "fail", "epoch": epoch, "reason": reason}, self.timeout)

    def close(self) -> None:
        self.channel.close()

    def _ask(self, message: Message, timeout: float) -> Message:
        return answered(self.channel.ask(message, timeout))


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
        self._tables: dict[tuple[int, int], Any] = {}  # by source rank and slot
        self._sources: dict[int, Places] = {}
        self._opened: dict[int, list[int]] = {}
        self._events: dict[str, int] = {}

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
        if kind == "export":
            self._open(message)
            return {}
        if kind == "pull":
            self._own(visit, message)
            self._pull(message)
            self._leave(visit)
            return {}
        return super()._answers(visit, message, kind)

    def _open(self, message: Message) -> None:
        if self.plan is None:
            raise RefitError("plan: none has been agreed on")
        rank = int(message["rank"])
        for base in self._opened.pop(rank, []):
            self.device.close(base)
        bases = [self.device.open(base64.b64decode(h)) for h in message["handles"]]
        self._opened[rank] = bases
        places = Places(self.plan.source, rank)
        itemsize = self.plan.source.params.nbytes // self.plan.source.params.shape.prod(1)
        for i, name in self.plan.source.of_rank(rank):
            number, offset, shape, stride = message["places"][name]
            places.address[i] = bases[number] + offset
            if len(shape) <= 2:
                places.pitch[i] = stride[0] * itemsize[i]
        self._sources[rank] = places
        for slot, dest in enumerate(self._places):
            table = copies(self.plan, self.plan.between(rank, self.rank), places, dest)
            self._tables[rank, slot] = self.device.table(table)

    def _pull(self, message: Message) -> None:
        epoch, rank, text = int(message["epoch"]), int(message["rank"]), message["event"]
        slot = self.weights.current(epoch)
        if (rank, slot) not in self._tables:
            raise RefitError(f"export: rank {rank} has not exported its memory")
        if text not in self._events:
            self._events[text] = self.device.open_event(base64.b64decode(text))
        self.device.wait(self._events[text])
        self.device.run(self._tables[rank, slot])
        with self._lock:
            self.weights.current(epoch)  # a copy that took too long does not count
            self._done.setdefault(epoch, set()).add(rank)
            self._lock.notify_all()

    def _fill_pads(self, slot: int) -> None:
        for param, row, col, rows, cols in self.dest.pads.tolist():
            if self.dest.params.rank[param] == self.rank:
                shape = self.dest.params.shape[param].tolist()
                self._tensors[slot][self.dest.params.names[param]].detach().view(shape)[row : row + rows, col : col + cols] = 0

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
        self._stream: Any = None

    def export(self, address: int) -> tuple[bytes, int]:
        handle, offset, _ = self._cuda.ipc_export(address)
        return handle, offset

    def open(self, handle: bytes) -> int:
        with torch.cuda.device(self.device):
            return int(self._cuda.ipc_open(handle))

    def close(self, base: int) -> None:
        self._cuda.ipc_close(base)

    def event(self) -> tuple[int, bytes]:
        with torch.cuda.device(self.device):
            event, handle = self._cuda.ipc_event()
        return event, handle

    def open_event(self, handle: bytes) -> int:
        with torch.cuda.device(self.device):
            return int(self._cuda.ipc_open_event(handle))

    def record(self, event: int) -> None:
        self._cuda.record_event(event, torch.cuda.current_stream(self.device).cuda_stream)

    def wait(self, event: int) -> None:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        self._cuda.wait_event(event, self._stream.cuda_stream)

    def table(self, table: Ints) -> Any:
        made = [torch.from_numpy(np.ascontiguousarray(t)).to(self.device) for t in (table, tiles(table))]
        torch.cuda.current_stream(self.device).synchronize()
        return made

    def launch(self, table: Any, stream: Any) -> None:
        rows, cut = table
        self._cuda.run_copies(rows.data_ptr(), cut.data_ptr(), cut.shape[0], stream.cuda_stream)

    def run(self, table: Any) -> None:
        stream = self._stream or torch.cuda.current_stream(self.device)
        self.launch(table, stream)
        stream.synchronize()
