"""A small model with a tokenizer, and small data, for the tests of training: fixtures to import in a conftest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastrlhf.data import train_tokenizer
from fastrlhf.models import Decoder, DecoderConfig, save_decoder

WORDS = ["red", "blue", "green", "one", "two", "three", "cat", "dog"]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer((f"{a} {b}" for a in WORDS for b in WORDS), 300)
    config = {
        "model_type": "llama", "vocab_size": -(-len(tokenizer) // 8) * 8, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "initializer_range": 0.1, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    save_decoder(Decoder(DecoderConfig.from_hf(config)).initialize(0), directory, tokenizer=tokenizer)
    return str(directory)


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [{"prompt": f"{a} {b} {c}", "answer": c} for a in WORDS for b in WORDS[:3] for c in WORDS[:2]]
    return write(tmp_path_factory.mktemp("data") / "prompts.jsonl", rows)


@pytest.fixture(scope="session")
def sft_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [{"prompt": f"{a} {b}", "completion": f" {b} {a}"} for a in WORDS for b in WORDS]
    return write(tmp_path_factory.mktemp("data") / "sft.jsonl", rows)


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [
        {"prompt": f"{a} {b}", "chosen": f" {a}", "rejected": f" {b} {b}", "margin": 0.1}
        for a in WORDS
        for b in WORDS
        if a != b
    ]
    return write(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows)


def letters(prompts: list[str], completions: list[str], **fields: Any) -> list[float]:
    """A reward that varies from completion to completion."""
    return [len(set(c)) / 10 - 0.01 * len(c) for c in completions]


@pytest.fixture
def on_policy(model_dir: str, prompts_file: str, tmp_path: Path) -> Callable[..., list[str]]:
    """Command-line words of a small on-policy run; more come after."""

    def words(*more: str, directory: str = "run") -> list[str]:
        return [
            "--run.directory", str(tmp_path / directory), "--run.tensorboard", "false", "--run.report", "false", "--model.path", model_dir,
            "--data.path", prompts_file, "--data.max_prompt_tokens", "40", "--rewards",
            '[{"function": "tests.trainer:letters"}]', "--steps", "3", "--prompts_per_step", "6",
            "--sampling.max_tokens", "12", "--update.optimizer.lr", "1e-3", *more,
        ]  # fmt: skip

    return words
