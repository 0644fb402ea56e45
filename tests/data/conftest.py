"""Every test of the data floor has a cache of its own; the real files are found once."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from fastrlhf.data import Rows, train_tokenizer

REAL = Path(os.environ.get("FASTRLHF_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
TEXTS = ["the quick brown fox jumps over the lazy dog", "Question: what is 12 + 34?\nAnswer: 46", "user assistant system"] * 3


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTRLHF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Iterable[Any]], Path]:
    """write(name, lines): a file of these lines, str and bytes as they are, others as JSON."""

    def write_(name: str, lines: Iterable[Any]) -> Path:
        path = tmp_path / name
        as_bytes = (x if isinstance(x, bytes) else (x if isinstance(x, str) else json.dumps(x)).encode() for x in lines)
        path.write_bytes(b"".join(x + b"\n" for x in as_bytes))
        return path

    return write_


@pytest.fixture(scope="session")
def trained() -> Any:
    pytest.importorskip("transformers")
    return train_tokenizer(TEXTS, 320)


@pytest.fixture
def tokenizer(trained: Any) -> Any:
    """Trained on a few words, with ChatML; a test may change it."""
    return copy.deepcopy(trained)


@pytest.fixture
def plain_tokenizer(tokenizer: Any) -> Any:
    """The same without a chat template."""
    tokenizer.chat_template = None
    return tokenizer


def real(name: str) -> Path:
    path = REAL / name
    if not path.exists():
        pytest.skip(f"{path} is absent (FASTRLHF_DATA names the folder of gsm8k and hh-rlhf)")
    return path


def rows(*records: dict[str, Any]) -> Rows:
    return Rows.from_list(records, "mem")
