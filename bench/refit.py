"""Refits between two processes on the CPU, against this machine's copy bandwidth and the clone-out-of-shared-memory way, in one
run: `python -m bench.refit`.

The other way is what trainers do today: tensors go one after another into a bucket in shared memory, the engine clones each
out of it and copies the clone into its parameter.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastrlhf import _cpu
from fastrlhf.generation import EmbeddedEngine, EmbeddedProcessEngine
from fastrlhf.models import Decoder, DecoderConfig
from fastrlhf.refit.live import parameters_of
from fastrlhf.refit.memory import run
from fastrlhf.refit.wire import Channel

GB = 1e9
BUCKET = 512 << 20


def config(gigabytes: float) -> dict[str, Any]:
    hidden, inner, vocab = 2048, 5632, 32000
    layer = 2 * (2 * hidden * hidden + 2 * hidden * 512 + 3 * hidden * inner)
    layers = max(1, round((gigabytes * GB - 2 * 2 * vocab * hidden) / layer))
    return {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    }  # fmt: skip


def best(call: Callable[[], Any], turns: int) -> float:
    seconds = []
    for _ in range(turns):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def together(ways: dict[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """The best seconds of each, called in turn: what slows one slows all."""
    seconds = {name: float("inf") for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            seconds[name] = min(seconds[name], best(way, 1))
    return seconds


def copy_ways(nbytes: int, threads: int) -> dict[str, Callable[[], Any]]:
    """Copies between two private buffers that exist: libc's memmove, torch's copy_, and ours."""
    a, b = torch.ones(nbytes, dtype=torch.uint8), torch.ones(nbytes, dtype=torch.uint8)
    table = np.array([[a.data_ptr(), b.data_ptr(), 1, nbytes, nbytes, nbytes]], np.int64)
    return {
        "memmove": lambda: ctypes.memmove(b.data_ptr(), a.data_ptr(), nbytes),
        "torch copy_": lambda: b.copy_(a),
        "run_copies": lambda: run(table, threads=threads),
    }


def clone_receiver(fd: int, options: str) -> None:
    """The engine of the other way: parameters of its own, and clones."""
    given = json.loads(options)
    torch.set_num_threads(given["threads"])
    channel = Channel(socket.socket(fileno=fd), "trainer")
    message, fds = channel.receive()
    arena = _cpu.Arena(fds[0], message["bytes"])
    bucket = torch.frombuffer(arena, dtype=torch.uint8)
    parameters = [torch.zeros(s, dtype=torch.bfloat16) for s in message["shapes"]]
    channel.send({})
    while True:
        entries = channel.receive()[0]["entries"]
        if not entries:
            return
        for i, at in entries:
            p = parameters[i]
            clone = bucket[at : at + p.nbytes].view(p.dtype).view(p.shape).clone()
            p.copy_(clone)
            del clone
        channel.send({})


@contextmanager
def clone_way(tensors: list[torch.Tensor], threads: int) -> Iterator[Callable[[], None]]:
    """A refit the other way."""
    ours, theirs = socket.socketpair()
    child = subprocess.Popen(
        [sys.executable, "-m", "bench.refit", "--receive", str(theirs.fileno()), "--options", json.dumps({"threads": threads})],
        pass_fds=[theirs.fileno()],
    )  # fmt: skip
    theirs.close()
    arena = _cpu.Arena(max(BUCKET, max(t.nbytes for t in tensors)))
    bucket = torch.frombuffer(arena, dtype=torch.uint8)
    channel = Channel(ours, "receiver")
    channel.send({"bytes": arena.nbytes, "shapes": [list(t.shape) for t in tensors]}, (arena.fd,))
    channel.receive()

    def refit() -> None:
        at, entries = 0, []
        for i, t in enumerate(tensors):
            if at + t.nbytes > arena.nbytes:
                channel.ask({"entries": entries})
                at, entries = 0, []
            bucket[at : at + t.nbytes].view(t.dtype).view(t.shape).copy_(t)
            entries.append((i, at))
            at += t.nbytes
        channel.ask({"entries": entries})

    refit()
    yield refit
    channel.send({"entries": []})
    child.wait()


def measure(gigabytes: float, threads: int, turns: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    model = Decoder(DecoderConfig.from_hf(config(gigabytes)), dtype=torch.bfloat16)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    tensors = [t.detach() for t in parameters_of(model).values()]
    nbytes = sum(t.nbytes for t in tensors)
    out: dict[str, Any] = {
        "bytes": nbytes,
        "parameters": len(tensors),
        "threads": threads,
        "turns": turns,
        "cpus": os.cpu_count(),
    }
    with EmbeddedProcessEngine(model, slots=1) as engine, clone_way(tensors, threads) as other:
        engine.update_weights(None, 0)
        ways = copy_ways(nbytes, threads) | {"refit": lambda: engine.update_weights(None, 1), "clone way": other}
        seconds = together(ways, turns)
    out["GB/s"] = {name: nbytes / s / GB for name, s in seconds.items()}
    bandwidth = max(out["GB/s"][name] for name in ("memmove", "torch copy_", "run_copies"))
    out["refit of copy bandwidth"] = out["GB/s"]["refit"] / bandwidth
    out["refit times the clone way"] = seconds["clone way"] / seconds["refit"]
    for name, options in (("two slots", {}), ("hashed and verified", {"slots": 1, "verify": True})):
        with EmbeddedProcessEngine(model, **options) as engine:
            engine.update_weights(None, 0)
            out["GB/s"]["refit, " + name] = nbytes / best(lambda engine=engine: engine.update_weights(None, 1), turns) / GB
    n = 50_000
    small = torch.zeros(2, n, 4096, dtype=torch.uint8)
    row = np.arange(n, dtype=np.int64) * 4096
    one = np.ones(n, np.int64)
    table = np.stack([small[0].data_ptr() + row, small[1].data_ptr() + row, one, 4096 * one, 4096 * one, 4096 * one], 1)
    out["microseconds a copy"] = {
        "4096 bytes": best(lambda: run(table), turns) / n * 1e6,
        "64 bytes": best(lambda: run(table * [1, 1, 1, 0, 1, 1] + [0, 0, 0, 64, 0, 0]), turns) / n * 1e6,
    }
    own = EmbeddedEngine(model)
    taken = own.update_weights(None, 1)
    out["in process"] = {"seconds": best(lambda: own.update_weights(None, 2), turns), "bytes copied": taken.copied}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--receive", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--options", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.receive is not None:
        return clone_receiver(given.receive, given.options)
    found = measure(given.gigabytes, given.threads, given.turns)
    print(json.dumps(found, indent=2))
    if given.out:
        given.out.write_text(json.dumps(found, indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()
