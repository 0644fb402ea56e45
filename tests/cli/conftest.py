"""Small files and models for the tests of commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from fastrlhf.cli.main import main

ROWS = [
    {"prompt": "tom has 7 apples. how many?", "completion": " 7"},
    {"prompt": "ann has 12 pens, loses 3. how many?", "completion": " 12-3=9. 9"},
    {"prompt": "é & 日本\n", "completion": "  two spaces"},
] * 4


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRLHF_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """command(*words) -> (exit status, stdout, stderr)."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run
