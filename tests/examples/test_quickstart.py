"""What the quickstart promises: PPO at least doubles its SFT model's held-out rate of exact answers, on three seeds; with a
learning rate of 0 it does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastrlhf.cli.main import main

pytest.importorskip("transformers")
CHAIN = str(Path(__file__).parents[2] / "examples" / "arithmetic" / "chain.yaml")


def exact(directory: Path) -> tuple[float, float]:
    """The held-out rate before and after PPO."""
    lines: list[dict[str, Any]] = [json.loads(x) for x in (directory / "ppo" / "metrics.jsonl").read_text().splitlines()]
    evals = [line["reward/exact"] for line in lines if line.get("phase") == "eval"]
    return evals[0], evals[-1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_doubles_the_rate(seed: int, runs: Path, record_property: Callable[[str, str], None]) -> None:
    assert main(["chain", CHAIN, "--directory", str(runs / str(seed)), "--seed", str(seed)]) == 0
    before, after = exact(runs / str(seed))
    record_property("figure", f"seed {seed}: held-out exact answers {before:.3f} -> {after:.3f}")
    assert before > 0.03 and after >= 2 * before


@pytest.mark.slow
def test_at_a_learning_rate_of_zero_nothing_improves(runs: Path, record_property: Callable[[str, str], None]) -> None:
    assert main(["chain", CHAIN, "--directory", str(runs / "0"), "--seed", "0"]) == 0  # done already but when run alone
    for stage in ("data", "model", "sft", "reward"):
        shutil.copytree(runs / "0" / stage, runs / "still" / stage)
    assert main(["chain", CHAIN, "--directory", str(runs / "still"), "--lr", "0"]) == 0
    before, after = exact(runs / "still")
    record_property("figure", f"learning rate 0: {before:.3f} -> {after:.3f}")
    assert after == before
