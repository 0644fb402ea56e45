"""Real input from the command line: GSM8K and HH-RLHF through SFT, a reward model, DPO and PPO, their tokenizer trained on them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastrlhf.cli.main import main
from fastrlhf.data import load_tokenizer, open_rows

from ..data.conftest import REAL, cache  # noqa: F401  # the index of a file goes to the test's own cache

pytest.importorskip("transformers")
CHAIN = Path(__file__).parents[2] / "examples" / "gsm8k" / "chain.yaml"


def metrics(directory: Path, phase: str | None) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("phase") == phase]


@pytest.mark.slow
def test_gsm8k_and_hh_rlhf_run_through_the_chain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], record_property: Callable[[str, str], None]
) -> None:
    if not (REAL / "gsm8k").is_dir() or not (REAL / "hh-rlhf").is_dir():
        pytest.skip(f"GSM8K and HH-RLHF are not in {REAL}")
    assert main(["chain", str(CHAIN), "--data", str(REAL), "--directory", str(tmp_path)]) == 0
    print(capsys.readouterr().out[-3000:])

    tokenizer = load_tokenizer(tmp_path / "model")
    counts: Counter[int] = Counter()
    for row in open_rows(REAL / "gsm8k" / "test.jsonl"):
        counts.update(tokenizer.encode(row["answer"]))
    total = sum(counts.values())
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    before, after = (line["loss"] for line in (metrics(tmp_path / "sft", "eval")[i] for i in (0, -1)))
    record_property("figure", f"held-out SFT loss {before:.3f} -> {after:.3f} nats a token; unigram entropy {entropy:.3f}")
    assert after < entropy < before

    reward = metrics(tmp_path / "reward", "eval")[-1]
    record_property("figure", f"held-out pair accuracy {reward['accuracy']:.3f} of {reward['examples']:.0f} pairs")
    assert reward["examples"] > 100 and 0 <= reward["accuracy"] <= 1

    first, last = (metrics(tmp_path / "dpo", "eval")[i] for i in (0, -1))
    record_property("figure", f"held-out DPO loss {first['loss']:.4f} -> {last['loss']:.4f}, accuracy {last['accuracy']:.3f}")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and last["reward_margin"] != 0 == first["reward_margin"]

    steps = metrics(tmp_path / "ppo", None)
    assert len(steps) >= 2 and all(math.isfinite(line["policy/loss"]) for line in steps)
    assert all(line["policy/rollout_mismatch_max"] < 1e-4 for line in steps)
