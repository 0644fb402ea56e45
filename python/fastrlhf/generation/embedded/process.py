"""The trainer's face of an embedded engine that runs in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.decoder import Decoder
from ...refit.live import Merged, catalogue_of
from ...refit.session import Refit, Session
from ...refit.states import PeerLost, Poisoned, RefitError, State
from ...refit.transports.posix_shm import PosixShm
from ...refit.wire import Channel
from ..engine import Completion, Finished, GenerationStats, Sampling
from .worker import WorkerOptions

_START = "import sys; from fastrlhf.generation.embedded.worker import main; sys.exit(main(sys.argv[1:]))"


class EmbeddedProcessEngine:
    """Draws what `EmbeddedEngine` draws, token for token, in another process, whose weights are replaced by one copy through
    shared memory. With two slots the old weights are served until the new ones are whole.

    Args:
        model: the trainer's; its weights as they are at `update_weights` are what is served, adapters merged in.
        tokenizer: directory of the tokenizer; only stop strings need it.
        slots: 2, or 1 for half the memory: then a refit waits for what is being generated, and one that fails leaves an
            engine that refuses to generate until the next succeeds.
        mode: what a refit does to running requests: drain, abort or keep.
        verify: hash every byte in the copy and again where it lies before serving it.
        timeout: seconds for each phase of a refit.
        options: of `EmbeddedEngine`.
    """

    def __init__(
        self, model: Decoder, tokenizer: str | None = None, *, slots: int = 2, mode: str = "drain", verify: bool = False,
        timeout: float = 600.0, phase: Callable[[str], None] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        one = next(model.parameters())
        if one.device.type != "cpu":
            raise ValueError(f"model: the embedded process engine is for the CPU, got {one.device}")
        if model.groups.tp.size * model.groups.pp.size > 1:
            raise ValueError("model: the embedded process engine has no tensor or pipeline parallelism yet")
        self.model, self.stats = model, GenerationStats()
        self.mode, self.verify, self.timeout, self._phase = mode, verify, timeout, phase
        self.context = options.get("context") or model.config.max_position_embeddings
        self._options = WorkerOptions(
            config=model.config.to_hf(), dtype=str(one.dtype).removeprefix("torch."), slots=slots,
            tokenizer=tokenizer, threads=torch.get_num_threads(), engine=options,
        )  # fmt: skip
        self._source = Merged(model)
        self._process: subprocess.Popen[bytes] | None = None
        self._generate: Channel | None = None
        self._streaming = False
        self.session: Session | None = None

    @property
    def version(self) -> int:
        return -1 if self.session is None else self.session.version

    @property
    def pid(self) -> int | None:
        """Of the engine's process; None where there is none."""
        return None if self._process is None else self._process.pid

    def update_weights(self, weights: Iterable[tuple[str, Tensor]] | None, version: int) -> Refit:
        """`weights` must be None: they are those of `model`. Starts the process where there is none, or none any more."""
        if weights is not None:
            raise ValueError("weights: expected None, the embedded process engine takes those of its model")
        session = self._running()
        self._source.refresh()
        return session.refit(version)

    def generate(
        self, prompts: Seq[Seq[int]], sampling: Sampling, *, seeds: Seq[int] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:  # fmt: skip
        """n completions of each prompt; `progress` is told of each that ends."""
        out: list[list[Any]] = [[None] * sampling.n for _ in prompts]
        for done in self.stream(prompts, sampling, seeds=seeds):
            out[done.prompt][done.sample] = done.completion
            if progress is not None:
                progress(1)
        return out

    def stream(self, prompts: Seq[Seq[int]], sampling: Sampling, *, seeds: Seq[int] | None = None) -> Iterator[Finished]:
        """Completions as they end.

        Raises:
            ValueError: as `EmbeddedEngine.stream`.
            Poisoned: the engine has no whole weights.
            PeerLost: its process is gone; the next `update_weights` starts another.
        """
        if self.session is None or self._generate is None:
            raise Poisoned("engine: it has no weights yet; update_weights comes first")
        self.session.require_serving()
        if self._streaming:
            raise RuntimeError("engine: a stream is under way; close it, or read it to its end, before the next")
        channel, ended = self._generate, False
        self._streaming = True
        channel.send(
            {"kind": "generate", "prompts": [list(p) for p in prompts], "sampling": asdict(sampling),
             "seeds": None if seeds is None else list(seeds)}
        )  # fmt: skip
        try:
            while True:
                message, _ = channel.receive()
                if "finished" in message:
                    prompt, sample, fields = message["finished"]
                    fields["weight_spans"] = tuple((v, n) for v, n in fields["weight_spans"])
                    yield Finished(prompt, sample, Completion(**fields))
                    continue
                ended = True
                if "error" in message:
                    kinds = {"ValueError": ValueError, "Poisoned": Poisoned}
                    raise kinds.get(message["error"], RefitError)(message["text"])
                self.stats = GenerationStats(**message["stats"])
                return
        except PeerLost:
            ended = True
            self.session.state, self.session.reason = State.POISONED, "its process is gone"
            self.session.target.close()  # its memory is of no use
            raise
        except KeyboardInterrupt:  # perhaps in the middle of a message
            ended = True
            channel.close()
            raise
        finally:
            self._streaming = False
            if not ended:  # the caller wants no more
                with contextlib.suppress(PeerLost):
                    channel.send({"kind": "cancel"})
                    while "finished" in channel.receive()[0]:
                        pass

    def close(self) -> None:
        """Ends the process; its memory goes with it."""
        if self._generate is not None:
            self._generate.close()
        if self.session is not None:
            self.session.target.close()
        if self._process is not None:
            try:
                self._process.wait(0.5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process, self._generate, self.session = None, None, None

    def __enter__(self) -> EmbeddedProcessEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _whole(self) -> bool:
        """Whether the process and both connections are there."""
        running = self._process is not None and self._process.poll() is None
        return running and self._generate is not None and self._generate.alive and self._target.alive

    def _running(self) -> Session:
        if self.session is not None and self._whole:
            return self.session
        if self._process is not None:
            self.close()
        ours, theirs = zip(*(socket.socketpair() for _ in range(2)), strict=True)
        options = asdict(self._options) | {"connections": [s.fileno() for s in theirs]}
        package = str(Path(__file__).resolve().parents[3])
        path = os.pathsep.join(p for p in (package, os.environ.get("PYTHONPATH", "")) if p)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps(options)],
            pass_fds=options["connections"], env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
        for s in theirs:
            s.close()
        name = f"engine process {self._process.pid}"
        self._generate = Channel(ours[1], name)
        self._target = PosixShm(
            [Channel(ours[0], name)], catalogue_of(self.model), self._source.tensors, verify=self.verify,
            timeout=max(60.0, self.timeout),
        )  # fmt: skip
        self.session = Session(self._target, mode=self.mode, timeout=self.timeout, phase=self._phase)
        return self.session
