"""The embedded engine as a process of its own: `python -m fastrlhf.generation.embedded.worker`.

Its parameters lie in memory that trainers map and write. One thread for each connection answers refits, the main thread
generates. Started by a trainer it has connections from birth and ends with them; started with `listen` it takes any number
of trainers, one after another or together.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...models import Decoder, DecoderConfig
from ...refit.host import Host
from ...refit.live import catalogue_of
from ...refit.memory import Places, shared_memory
from ...refit.states import PeerLost, Weights
from ...refit.wire import Channel, Message
from ..engine import Sampling
from .engine import EmbeddedEngine


@dataclass
class WorkerOptions:
    """
    Args:
        config: contents of the model's config.json.
        slots: copies of the weights: 2 lets the old ones serve until the new ones are whole, 1 takes half the memory.
        tokenizer: its directory; stop strings need it.
        connections: inherited descriptors; the process ends as soon as one is closed.
        listen: path of a UNIX socket to take connections at instead.
        engine: of `EmbeddedEngine`.
    """

    config: dict[str, Any]
    dtype: str = "float32"
    slots: int = 2
    tokenizer: str | None = None
    threads: int | None = None
    connections: list[int] = field(default_factory=list)
    listen: str | None = None
    engine: dict[str, Any] = field(default_factory=dict)


class Worker:
    def __init__(self, options: WorkerOptions) -> None:
        if options.threads:
            torch.set_num_threads(options.threads)
        config = DecoderConfig.from_hf(options.config)
        dtype = getattr(torch, options.dtype)
        models = [Decoder(config, device="meta", dtype=dtype).eval() for _ in range(options.slots)]
        catalogue = catalogue_of(models[0])
        _, size = Places.in_arena(catalogue, 0, 0)
        self.arena = shared_memory(size * options.slots)
        for slot, model in enumerate(models):
            places, _ = Places.in_arena(catalogue, 0, slot * size)
            offsets = {name: int(places.address[i]) for i, name in catalogue.of_rank(0)}
            lay(model, self.arena, offsets)
        self.weights = Weights(options.slots)
        self.engine = EmbeddedEngine(models[0], _tokenizer(options.tokenizer), **options.engine)
        self.engine.models, self.engine.weights = models, self.weights
        self.host = Host(catalogue, self.weights, self.arena)
        self._requests: queue.Queue[tuple[Channel, Message, _Stop]] = queue.Queue()

    def connect(self, channel: Channel, *, ends: bool) -> None:
        """Answer a connection on a thread; the process ends with it where `ends`."""

        def answer() -> None:
            stop = _Stop()

            def other(message: Message) -> bool:
                if message["kind"] == "generate":
                    stop.clear()
                    self._requests.put((channel, message, stop))
                elif message["kind"] == "cancel":
                    stop.set()
                else:
                    return False
                return True

            try:
                self.host.serve(channel, other)
            finally:
                stop.set()
                if ends:
                    os._exit(0)  # whatever is being computed is for nobody

        threading.Thread(target=answer, daemon=True).start()

    def run(self) -> None:
        """Generates, request after request."""
        while True:
            channel, message, stop = self._requests.get()
            try:
                self._generate(channel, message, stop)
            except PeerLost:
                continue

    def _generate(self, channel: Channel, message: Message, stop: threading.Event) -> None:
        try:
            given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in message["sampling"].items()}
            sampling = Sampling(**given)
            for done in self.engine.stream(message["prompts"], sampling, seeds=message["seeds"]):
                if stop.is_set():
                    break
                channel.send({"finished": [done.prompt, done.sample, asdict(done.completion)]})
        except Exception as error:  # to whoever asked: this process serves others too
            channel.send({"error": type(error).__name__, "text": str(error)})
            return
        channel.send({"stats": asdict(self.engine.stats)})


class _Stop(threading.Event):
    """Asks the generation of a connection to end."""


def lay(model: nn.Module, arena: Any, offsets: dict[str, int]) -> None:
    """Makes a module's parameters views of an arena."""
    for name, p in list(model.named_parameters()):
        owner = model.get_submodule(name.rpartition(".")[0])
        flat = torch.frombuffer(arena, dtype=p.dtype, count=p.numel(), offset=offsets[name])
        setattr(owner, name.rpartition(".")[2], nn.Parameter(flat.view(p.shape), requires_grad=False))


def _tokenizer(path: str | None) -> Any:
    if path is None:
        return None
    from ...data import load_tokenizer

    return load_tokenizer(path)


def _listen(path: str) -> Iterator[Channel]:
    Path(path).unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(path)
        server.listen()
        while True:
            yield Channel(server.accept()[0], "trainer")


def main(argv: Sequence[str]) -> int:
    """The options are JSON, the only argument."""
    options = WorkerOptions(**json.loads(argv[0]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a trainer's: it says when to end
    worker = Worker(options)
    for fd in options.connections:
        worker.connect(Channel(socket.socket(fileno=fd), "trainer"), ends=True)
    if options.listen is not None:
        path = options.listen

        def accept() -> None:
            for channel in _listen(path):
                worker.connect(channel, ends=False)

        threading.Thread(target=accept, daemon=True).start()
    worker.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
