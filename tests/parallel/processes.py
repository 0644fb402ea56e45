"""Small models and runs over a few gloo processes."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fastrlhf.data import train_tokenizer
from fastrlhf.models import Decoder, DecoderConfig, save_decoder

from ..trainer import WORDS, write

LLAMA: dict[str, Any] = {"model_type": "llama"}
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


def spawn(world: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(rank, *arguments)` returns in each of so many processes."""
    with tempfile.TemporaryDirectory() as directory:
        multiprocessing.set_forkserver_preload(["fastrlhf.algorithms.ppo", "transformers"])  # imported once, not once a process
        mp.start_processes(_work, (world, directory, work, arguments), nprocs=world, start_method="forkserver")
        return [torch.load(f"{directory}/{rank}.pt", weights_only=False) for rank in range(world)]


def _work(rank: int, world: int, directory: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world)
    torch.save(work(rank, *arguments), f"{directory}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
