"""Small models and runs over a few gloo processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fastrlhf.cli import train
from fastrlhf.cli.console import Console
from fastrlhf.data import train_tokenizer
from fastrlhf.models import Decoder, DecoderConfig, save_decoder
from fastrlhf.training import loop
from fastrlhf.training.progress import Silent

from ..trainer import WORDS, write

PRELOAD = [  # imported once, not once a process
    "fastrlhf.algorithms.ppo", "fastrlhf.cli.train", "torch.distributed.checkpoint", "transformers.models.auto.tokenization_auto",
]  # fmt: skip

LLAMA: dict[str, Any] = {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
QWEN: dict[str, Any] = {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 8}
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "dp2": (2, {}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2}),
    "tp2 dp2": (4, {"tp": 2}),
    "pp2 dp2": (4, {"pp": 2}),
    "pp2 interleaved": (2, {"pp": 2, "interleave": 2}),
    "tp4": (4, {"tp": 4}),
    "pp4": (4, {"pp": 4}),
}
"""(processes, options of the section parallel), by name."""


def make_model(directory: Path, kind: dict[str, Any], layers: int = 4) -> str:
    tokenizer = train_tokenizer((f"{a} {b}" for a in WORDS for b in WORDS), 300)
    config = {
        "vocab_size": -(-len(tokenizer) // 8) * 8, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.1,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, **kind,
    }  # fmt: skip
    save_decoder(Decoder(DecoderConfig.from_hf(config)).initialize(3), directory, tokenizer=tokenizer)
    return str(directory)


def make_data(directory: Path) -> dict[str, str]:
    prompts = [{"prompt": " ".join([a, b, c][: 1 + i % 3])} for i, (a, b, c) in enumerate(
        (a, b, c) for a in WORDS for b in WORDS[:3] for c in WORDS[:2]
    )]  # fmt: skip
    sft = [{"prompt": f"{a} {b}", "completion": f" {b} {a}" * (1 + i % 3)} for i, (a, b) in enumerate(
        (a, b) for a in WORDS for b in WORDS
    )]  # fmt: skip
    pairs = [{"prompt": f"{a} {b}", "chosen": f" {a}", "rejected": f" {b} {b}"} for a in WORDS for b in WORDS if a != b]
    return {n: write(directory / f"{n}.jsonl", rows) for n, rows in (("prompts", prompts), ("sft", sft), ("pairs", pairs))}


def parallel_words(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--parallel.{name}", str(value))]


def spawn(world: int, work: Callable[..., Any], *arguments: Any, timeout: float = 600) -> list[Any]:
    """What `work(rank, *arguments)` returns in each of so many processes. `timeout`: seconds of an exchange among them."""
    with tempfile.TemporaryDirectory() as directory:
        multiprocessing.set_forkserver_preload(PRELOAD)
        mp.start_processes(_work, (world, directory, work, arguments, timeout), nprocs=world, start_method="forkserver")
        return [torch.load(f"{directory}/{rank}.pt", weights_only=False) for rank in range(world)]


def _work(
    rank: int, world: int, directory: str, work: Callable[..., Any], arguments: tuple[Any, ...], timeout: float
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
    )
    torch.save(work(rank, *arguments), f"{directory}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def launch(
    world: int, words: list[str], directory: Path, kill: tuple[int, int, str, str] | None = None, timeout: float = 120
) -> list[tuple[int, str]]:
    """The exit status and standard error of each of `world` processes of the command `fastrlhf`.

    Args:
        kill: (rank, step, phase, how): what becomes of a process when it comes to that phase of that step: "SIGKILL",
            "SIGSTOP" (it stays, and does nothing more), or "raise", an error of its own. "start" and "report" are before the
            first step and after the last.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    logs = [directory / f"stderr-{rank}" for rank in range(world)]
    started = [
        context.Process(target=_command, args=(rank, world, port, words, str(log), kill)) for rank, log in enumerate(logs)
    ]
    for process in started:
        process.start()
    end = time.monotonic() + timeout
    stopped = [kill[0]] if kill is not None and kill[3] == "SIGSTOP" else []
    for rank in [r for r in range(world) if r not in stopped] + stopped:
        if rank in stopped:
            started[rank].kill()
        started[rank].join(max(0.0, end - time.monotonic()))
    stuck = [rank for rank, process in enumerate(started) if process.exitcode is None]
    for rank in stuck:
        started[rank].kill()
        started[rank].join()
    texts = [log.read_text() if log.exists() else "" for log in logs]
    assert not stuck, f"still running after {timeout} s: {stuck}\n" + "\n".join(texts)
    return [(int(process.exitcode or 0), text) for process, text in zip(started, texts, strict=True)]


def _command(rank: int, world: int, port: int, words: list[str], log: str, kill: tuple[int, int, str, str] | None) -> None:
    sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115  # for the life of the process
    os.dup2(sys.stderr.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    if kill is not None and kill[0] == rank:
        _die_at(*kill[1:])
    from fastrlhf.cli.main import main

    sys.exit(main(words))


def _die_at(step: int, phase: str, how: str) -> None:
    """Puts an end into the progress of this process."""
    at = 0
    silent, advance = Silent.phase, loop.rng_tensors

    def die(*_: Any, **__: Any) -> Any:
        if how == "raise":
            raise RuntimeError("an error of its own")
        os.kill(os.getpid(), getattr(signal, how))

    if phase == "start":
        train.prepare = lambda *_: (time.sleep(2), die())  # when the others have come as far, on a loaded machine too
    if phase == "report":
        loop.write_report = die  # of a run with run.report

    def count() -> dict[str, torch.Tensor]:  # called before each step
        nonlocal at
        at += 1
        return advance()

    @contextmanager
    def watched(self: Silent, name: str, total: float | None = None) -> Iterator[Any]:
        if at >= step and name == phase:
            die()
        with silent(self, name, total) as inner:
            yield inner

    loop.rng_tensors = count  # type: ignore[assignment]
    Silent.phase = watched  # type: ignore[method-assign]
    Console.phase = watched  # type: ignore[method-assign]


def refuses(prompts: list[str], completions: list[str], **fields: Any) -> list[float]:
    """A reward function that fails."""
    raise ValueError(f"no reward for {len(completions)} completions")
