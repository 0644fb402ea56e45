"""An engine that listens and trainers that come and go, each a process; `python -m tests.refit.processes` is a trainer."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fastrlhf.generation import Completion, EmbeddedEngine, Sampling
from fastrlhf.models import Decoder, DecoderConfig
from fastrlhf.refit.live import catalogue_of, parameters_of
from fastrlhf.refit.session import Session
from fastrlhf.refit.transports import posix_shm
from fastrlhf.refit.wire import Channel

CONFIG = {
    "model_type": "qwen2", "vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3,
}  # fmt: skip
PROMPTS = [[1, 2, 3], [50, 4], [9]]
SEEDS = [7, 8, 9]
SAMPLING = Sampling(n=2, max_tokens=12)


def decoder(seed: int) -> Decoder:
    return Decoder(DecoderConfig.from_hf(CONFIG)).initialize(seed)


def fresh(seed: int) -> list[list[list[int]]]:
    """What an engine that was loaded with these weights makes."""
    return tokens(EmbeddedEngine(decoder(seed)).generate(PROMPTS, SAMPLING, seeds=SEEDS))


def tokens(out: list[list[Completion]]) -> list[list[list[int]]]:
    return [[c.tokens for c in group] for group in out]


class Engine:
    """A worker process that listens at a path."""

    def __init__(self, path: Path, slots: int) -> None:
        self.path = str(path)
        options = {"config": CONFIG, "slots": slots, "listen": self.path, "threads": 1}
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import sys; from fastrlhf.generation.embedded.worker import main; main(sys.argv[1:])",
             json.dumps(options)]
        )  # fmt: skip
        self.watch = self.connect()

    def connect(self) -> Channel:
        end = time.monotonic() + 60
        while True:
            s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                s.connect(self.path)
                return Channel(s, "engine")
            except OSError:
                s.close()
                if time.monotonic() > end or self.process.poll() is not None:
                    raise
                time.sleep(0.02)

    def state(self) -> dict[str, Any]:
        return self.watch.ask({"kind": "state"}, 10)

    def generate(self, max_tokens: int = SAMPLING.max_tokens) -> Any:
        """Completions by prompt and sample, or the error's name."""
        channel = self.connect()
        channel.send({"kind": "generate", "prompts": PROMPTS, "seeds": SEEDS, "sampling": {"n": 2, "max_tokens": max_tokens}})
        out: dict[tuple[int, int], Any] = {}
        while True:
            message = channel.receive(60)[0]
            if "finished" not in message:
                channel.close()
                return message.get("error") or [[out[p, s]["tokens"] for s in range(2)] for p in range(len(PROMPTS))]
            out[message["finished"][0], message["finished"][1]] = message["finished"][2]

    def close(self) -> None:
        self.watch.close()
        self.process.kill()
        self.process.wait()


@contextmanager
def engine(path: Path, slots: int) -> Any:
    made = Engine(path, slots)
    try:
        yield made
    finally:
        made.close()


def session_at(channel: Channel, seed: int, **more: Any) -> Session:
    model = decoder(seed)
    target = posix_shm.PosixShm([channel], catalogue_of(model), parameters_of(model), verify=True, threads=1)
    return Session(target, timeout=20, version=target.version, epoch=target.epoch, **more)


def trainer(path: str, seed: int, version: int, dies: str, forks: bool = False) -> subprocess.Popen[bytes]:
    """A process that refits once and is killed as a phase begins: begin, draining, transfer, middle, commit, done; or never. `forks`:
    a child of it stays for a while, and all that it holds with it."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.refit.processes", path, str(seed), str(version), dies, *["forks"] * forks]
    )


def main(path: str, seed: str, version: str, dies: str, forks: str = "") -> None:
    torch.set_num_threads(1)

    def kill() -> None:
        if forks and os.fork() == 0:
            time.sleep(5)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)

    if dies == "middle":
        posix_shm.BUCKET, ran, count = 4096, posix_shm.run, 0

        def run(*args: Any, **more: Any) -> Any:
            nonlocal count
            count += 1
            if count == 9:
                kill()
            return ran(*args, **more)

        posix_shm.run = run
    s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    s.connect(path)
    session = session_at(Channel(s, "engine"), int(seed), phase=lambda phase: kill() if phase == dies else None)
    session.refit(int(version))


if __name__ == "__main__":
    main(*sys.argv[1:])
