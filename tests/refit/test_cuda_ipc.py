"""The protocol of two processes on one GPU, with a device whose handles are numbers and whose copies are the CPU's; and the copy
kernel as the host compiler builds it (`--kernels cuda`)."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from fastrlhf.refit import PeerLost, PlanError, RefitError, Session, State, Weights
from fastrlhf.refit.catalogue import Builder, Catalogue
from fastrlhf.refit.layouts import catalogue_for, layout
from fastrlhf.refit.memory import Places, run
from fastrlhf.refit.shapes import model_of
from fastrlhf.refit.transports.cuda_ipc import TILE, CudaIpc, CudaIpcHost, Gpu, tiles
from fastrlhf.refit.wire import Channel

from . import one_gpu
from .oracle import Split, config, whole


class Here:
    """A device of one process: what is read must lie in an allocation that is open, copies come after what they wait for.

    Args:
        allocations: (address, bytes); what lies in none of them is an allocation of its own, of a size nobody asked for.
    """

    def __init__(self, allocations: Sequence[tuple[int, int]] = ()) -> None:
        self.allocations = list(allocations)
        self.exports = self.events = 0
        self.open_at: Counter[tuple[int, int]] = Counter()  # by address and bytes
        self.open_events: set[int] = set()
        self.recorded: set[int] = set()
        self.log: list[str] = []

    def export(self, address: int) -> tuple[bytes, int, int]:
        self.exports += 1
        base, nbytes = next((a for a in self.allocations if a[0] <= address < sum(a)), (address - address % 64, 1 << 40))
        return base.to_bytes(8, "little") + nbytes.to_bytes(8, "little"), address - base, nbytes

    def open(self, handle: bytes) -> int:
        base, nbytes = (int.from_bytes(handle[i : i + 8], "little") for i in (0, 8))
        self.open_at[base, nbytes] += 1
        return base

    def close(self, base: int) -> None:
        (opened,) = (a for a in +self.open_at if a[0] == base)
        self.open_at[opened] -= 1

    @property
    def opens(self) -> int:
        return self.open_at.total()

    def event(self) -> tuple[int, bytes]:
        self.events += 1
        self.open_events.add(self.events)
        return self.events, self.events.to_bytes(8, "little")

    def open_event(self, handle: bytes) -> int:
        opened = -int.from_bytes(handle, "little")
        assert -opened in self.open_events and opened not in self.open_events
        self.open_events.add(opened)
        return opened

    def close_event(self, event: int) -> None:
        self.open_events.remove(event)

    def record(self, event: int) -> None:
        self.recorded.add(-event)

    def wait(self, event: int) -> None:
        assert event in self.recorded and event in self.open_events
        self.log.append("wait")

    def table(self, table: Any) -> Any:
        return table

    def run(self, table: Any) -> None:
        self.log.append("run")
        assert all(any(base <= a < base + n for base, n in +self.open_at) for a in table[:, 0].tolist())
        run(table)

    def synchronize(self) -> None:
        self.log.append("synchronize")


def pair() -> tuple[Any, ...]:
    c = config()
    a, b = layout("tp1", "megatron"), layout("tp1", "engine")
    source, dest = catalogue_for(model_of(c), a), catalogue_for(model_of(c), b)
    held = {n: t.contiguous().clone() for (_, n), t in Split(c, a, whole(source)).out.items()}
    expected = {n: t for (_, n), t in Split(c, b, whole(source)).out.items()}
    params = {n: torch.full(tuple(s), float("nan")) for n, s in zip(dest.params.names, dest.params.shape.tolist(), strict=True)}
    device, weights = Here(), Weights(1)
    host = CudaIpcHost(dest, weights, [params], device)
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=host.serve, args=(Channel(theirs, "trainer"),))
    thread.start()
    target = CudaIpc(Channel(ours, "engine"), source, held, device)
    return target, thread, held, params, expected, weights, device


def test_slices_are_copied_straight_into_the_engines_parameters() -> None:
    target, thread, held, params, expected, _weights, device = pair()
    addresses = {n: p.data_ptr() for n, p in params.items()}
    session = Session(target)
    for version in range(3):
        done = session.refit(version)
        assert (
            done.copied
            == done.nbytes
            == sum(t.numel() * 4 for n, t in held.items() if "embed" not in n and "lm_head" not in n) + 2 * 301 * 8 * 4
        )
        for n, t in expected.items():
            assert torch.equal(params[n], t.reshape(params[n].shape)), n
        for t in held.values():
            t += 1
        for t in expected.values():
            t += 1
        for n in ("model.embed_tokens.weight", "lm_head.weight"):
            expected[n][301:] = 0
    assert device.exports == len(held)  # exported once
    assert device.log == ["wait", "run", "synchronize"] * 3  # pads are there before the weights are served
    assert addresses == {n: p.data_ptr() for n, p in params.items()}
    target.close()
    thread.join()
    assert not device.opens and not device.open_events


def test_a_trainer_that_goes_in_the_middle_poisons() -> None:
    target, thread, *_, weights, _device = pair()
    session = Session(target)
    session.refit(0)
    target.begin(5, 1, "drain", 5)
    assert weights.state is State.REFITTING
    target.close()
    thread.join()
    assert weights.state is State.POISONED
    with pytest.raises(PeerLost):
        session.refit(2)


def matrix(rows: int = 8, cols: int = 4, dtype: str = "float32") -> Catalogue:
    builder = Builder(1)
    builder.put(builder.tensor("w", rows, cols, dtype), 0, 0, rows, cols, builder.param(0, "w", rows, cols, dtype))
    return builder.build()


class Engine:
    """Holds one matrix; any number of trainers on the same device may connect."""

    def __init__(self, device: Here) -> None:
        self.device, self.weights, self.param = device, Weights(1, version=0), torch.zeros(8, 4)
        self.host = CudaIpcHost(matrix(), self.weights, [{"w": self.param}], device)
        self.threads: list[threading.Thread] = []

    def connect(self) -> Channel:
        ours, theirs = socket.socketpair()
        self.threads.append(threading.Thread(target=self.host.serve, args=(Channel(theirs, "trainer"),), daemon=True))
        self.threads[-1].start()
        return Channel(ours, "engine")

    def trainer(self, tensor: torch.Tensor) -> CudaIpc:
        return CudaIpc(self.connect(), matrix(), {"w": tensor}, self.device)


def test_what_another_trainer_exports_is_not_of_this_ones_attempt() -> None:
    engine = Engine(Here())
    one, two = (engine.trainer(torch.full((8, 4), fill)) for fill in (1.0, 2.0))
    one.begin(1, 1, "drain", 5)
    two._bound._seen = []
    two._bound.refresh()  # exports again
    with pytest.raises(RefitError, match="attempt 1 is under way"):
        two.begin(2, 2, "drain", 5)
    three = engine.trainer(torch.full((8, 4), 3.0))
    one.transfer(1)
    one.commit(1, 1)
    assert torch.equal(engine.param, torch.ones(8, 4))
    two.begin(2, 2, "drain", 5)
    three.close()  # its mappings end, and nobody else's
    one.close()
    for i in (0, 2):
        engine.threads[i].join()
    assert engine.device.opens == 1
    two.transfer(2)
    two.commit(2, 2)
    assert torch.equal(engine.param, torch.full((8, 4), 2.0))


def test_each_allocation_is_opened_once_and_closed_with_its_connection() -> None:
    """sglang#4446, #17870, slime#1731, miles#3147: handles opened twice, or never closed."""
    flat = torch.arange(64.0)
    builder = Builder(1)
    for name in "ab":
        builder.put(builder.tensor(name, 8, 4, "float32"), 0, 0, 8, 4, builder.param(0, name, 8, 4, "float32"))
    catalogue, device = builder.build(), Here([(flat.data_ptr(), flat.nbytes)])
    params = {n: torch.zeros(8, 4) for n in "ab"}
    host = CudaIpcHost(catalogue, Weights(1), [params], device)
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=host.serve, args=(Channel(theirs, "trainer"),))
    thread.start()
    target = CudaIpc(Channel(ours, "engine"), catalogue, {"a": flat[:32].view(8, 4), "b": flat[32:].view(8, 4)}, device)
    session = Session(target)
    for version in range(3):
        session.refit(version)
        assert device.opens == 1 and len(device.open_events) == 2  # the trainer's, and as the engine has it
    assert torch.equal(torch.cat([params["a"], params["b"]]).flatten(), flat)
    target.close()
    thread.join()
    assert not device.opens and not device.open_events


def test_memory_that_cannot_be_exported() -> None:
    """expandable_segments makes allocations that have no handle: nothing is begun."""

    class Expandable(Here):
        def export(self, address: int) -> tuple[bytes, int, int]:
            raise RuntimeError(
                "CUDA: the allocation cannot be shared; PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True makes such"
            )

    engine = Engine(Expandable())
    with pytest.raises(RuntimeError, match="expandable_segments"):
        engine.trainer(torch.ones(8, 4))
    assert engine.weights.state is State.SERVING and not engine.device.open_events


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            torch.ones(8, 4, dtype=torch.int32),
            r"w: expected \(8, 4\) elements of float32, got a tensor \(8, 4\) of torch.int32",
        ),
        (torch.ones(2, 4), r"w: expected \(8, 4\) elements of float32, got a tensor \(2, 4\)"),
        (torch.ones(4, 8).t(), r"w: expected contiguous rows, got strides \(1, 8\)"),
    ],
)
def test_tensors_that_are_not_what_the_catalogue_says(
    tensor: torch.Tensor, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(Here())
    with pytest.raises(PlanError, match=message):
        engine.trainer(tensor)
    of_tensors = Places.of_tensors

    def trusting(catalogue: Catalogue, rank: int, tensors: Any) -> Places:  # a trainer that does not look
        return of_tensors(catalogue, rank, {"w": torch.ones(8, 4)})

    monkeypatch.setattr(Places, "of_tensors", trusting)
    with pytest.raises(PlanError, match=message):
        engine.trainer(tensor)


def test_an_export_that_lies_outside_its_allocation() -> None:
    memory = torch.ones(8, 4)
    engine = Engine(Here([(memory.data_ptr(), memory.nbytes - 4)]))
    with pytest.raises(PlanError, match="w: 128 bytes from 0 on are not within its allocation of 124"):
        engine.trainer(memory)


def test_places_compare_dtypes_and_not_sizes() -> None:
    with pytest.raises(PlanError, match=r"elements of bfloat16, got a tensor .* of torch.float16"):
        Places.of_tensors(matrix(dtype="bfloat16"), 0, {"w": torch.ones(8, 4, dtype=torch.float16)})


def test_the_scenario_of_the_gpu() -> None:
    """tests/gpu/test_refit.py, with memory in the GPU's place."""
    source, dest = one_gpu.sides("small")
    params, held, device = one_gpu.tensors(dest, 0.0, "cpu"), one_gpu.tensors(source, 0.5, "cpu"), Here()
    weight = params[one_gpu.READ]
    x = torch.ones(8, weight.shape[1], dtype=weight.dtype)
    host = one_gpu.Replaying(dest, params, device, lambda: x @ weight.t())
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=host.serve, args=(Channel(theirs, "trainer"),))
    thread.start()
    target = CudaIpc(Channel(ours, "engine"), source, held, device)
    one_gpu.refits_are_seen(Session(target), target, held, range(3))
    target.close()
    thread.join()


def test_it_needs_a_gpu() -> None:
    with pytest.raises(RefitError, match="expected parameters on a GPU, got cpu"):
        Gpu(torch.device("cpu"))


SHAPES = [
    (1, 3 * TILE + 5, 0),
    (1000, 48, 16),
    (7, 16, 0),
    (3, TILE, 32),
    (5, 1, 3),
    (2000, 1, 0),
    (0, 5, 0),
    (9, 2 * TILE, 64),
    (33, 130, 2),
]


def problem() -> tuple[Any, Any, Any, Any]:
    """(table, source, destination, what it must become)."""
    g = torch.Generator().manual_seed(0)
    source = torch.randint(0, 256, (2_500_000,), dtype=torch.uint8, generator=g)
    dest = torch.zeros(2_500_000, dtype=torch.uint8)
    expected = dest.clone()
    table, a, b = [], 0, 16
    for rows, width, gap in SHAPES:
        table.append([source.data_ptr() + a, dest.data_ptr() + b, rows, width, width + gap, width + 2 * gap])
        for r in range(rows):
            expected[b + r * (width + 2 * gap) :][:width] = source[a + r * (width + gap) :][:width]
        a += -(-rows * (width + gap) // 16) * 16
        b += -(-rows * (width + 2 * gap) // 16) * 16
    assert max(a, b) < 2_500_000
    return np.array(table, np.int64), source, dest, expected


def test_tiles_cover_each_copy_once() -> None:
    table, _source, dest, expected = problem()
    cut = tiles(table)
    assert (cut[:, 2] * cut[:, 4]).max() <= TILE and (cut[:, 2:5:2] > 0).all()
    small = np.stack(
        [table[cut[:, 0], i] + cut[:, 1] * table[cut[:, 0], 4 + i] + cut[:, 3] for i in (0, 1)]
        + [cut[:, 2], cut[:, 4], table[cut[:, 0], 4], table[cut[:, 0], 5]], 1
    )  # fmt: skip
    run(np.ascontiguousarray(small))
    assert torch.equal(dest, expected)
    assert (cut[:, 2] * cut[:, 4]).sum() == (table[:, 2] * table[:, 3]).sum()


def test_the_copy_kernel_on_the_host(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--kernels") != "cuda":
        pytest.skip("of --kernels cuda")
    from fastrlhf.ops import backend

    table, _source, dest, expected = problem()
    cut = tiles(table)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        return
    backend.native("cuda").run_copies(table.ctypes.data, cut.ctypes.data, len(cut), 0)
    assert torch.equal(dest, expected)
