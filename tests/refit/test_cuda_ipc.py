"""The protocol of two processes on one GPU, with a device whose handles are numbers and whose copies are the CPU's; and the copy
kernel as the host compiler builds it (`--kernels cuda`)."""

from __future__ import annotations

import socket
import threading
from typing import Any

import numpy as np
import pytest
import torch
from fastrlhf.refit import PeerLost, RefitError, Session, State, Weights
from fastrlhf.refit.layouts import catalogue_for, layout
from fastrlhf.refit.memory import run
from fastrlhf.refit.shapes import model_of
from fastrlhf.refit.transports.cuda_ipc import TILE, CudaIpc, CudaIpcHost, Gpu, tiles
from fastrlhf.refit.wire import Channel

from .oracle import Split, config, whole


class Here:
    """A device of one process: everything that is opened must have been exported, copies come after what they wait for."""

    def __init__(self) -> None:
        self.exports = self.opens = 0
        self.recorded: set[int] = set()
        self.log: list[str] = []

    def export(self, address: int) -> tuple[bytes, int]:
        self.exports += 1
        return (address - address % 64).to_bytes(8, "little"), address % 64

    def open(self, handle: bytes) -> int:
        self.opens += 1
        return int.from_bytes(handle, "little")

    def close(self, base: int) -> None:
        self.opens -= 1

    def event(self) -> tuple[int, bytes]:
        return 5, b"event"

    def open_event(self, handle: bytes) -> int:
        assert handle == b"event"
        return 5

    def record(self, event: int) -> None:
        self.recorded.add(event)

    def wait(self, event: int) -> None:
        assert event in self.recorded
        self.log.append("wait")

    def table(self, table: Any) -> Any:
        return table

    def run(self, table: Any) -> None:
        self.log.append("run")
        run(table)


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
    assert device.exports == len(held) and device.log == ["wait", "run"] * 3  # exported once
    assert addresses == {n: p.data_ptr() for n, p in params.items()}
    name = next(iter(held))
    moved = held[name].clone() + 5
    target.tensors[name] = moved
    target._exported = [(t, t.data_ptr() + (t is held[name])) for t, _ in target._exported]
    opened = device.opens
    session.refit(4)
    assert device.opens == opened and device.exports == 2 * len(held)  # exported again, the old handles closed
    target.close()
    thread.join()


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
