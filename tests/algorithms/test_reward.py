"""Bradley-Terry against its formula on transformers' sequence classifier; it learns to tell the sides apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fastrlhf.algorithms.reward import RewardConfig, RewardTraining
from fastrlhf.config import ConfigError, load
from fastrlhf.models import load_scalar_model
from fastrlhf.training.progress import Silent

transformers = pytest.importorskip("transformers")


def reward(model_dir: str, pairs_file: str, directory: Path, *more: str) -> RewardTraining:
    return RewardTraining(load(RewardConfig, None, [
        "--run.directory", str(directory), "--model.path", model_dir, "--data.path", pairs_file, "--batch_size", "8",
        "--optimizer.lr", "3e-3", "--optimizer.warmup_steps", "0", "--steps", "30", *more,
    ]))  # fmt: skip


@pytest.mark.parametrize("kind", ["bt", "margin_bt"])
def test_the_loss_is_bradley_terry(model_dir: str, pairs_file: str, tmp_path: Path, kind: str) -> None:
    ours = reward(model_dir, pairs_file, tmp_path, "--loss", kind)
    ours.export(tmp_path / "rm")
    hf = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    pairs = ours.stream.next(8)
    metrics = ours.accumulate(pairs)
    chosen, rejected = ours.rewards

    def score(tokens: list[int]) -> torch.Tensor:
        return hf.score(hf.model(torch.tensor([tokens])).last_hidden_state[0, -1])[0]

    gaps = torch.stack([score(p.prompt + p.chosen) - score(p.prompt + p.rejected) for p in pairs])
    margin = torch.tensor([p.margin or 0.0 for p in pairs]) if kind == "margin_bt" else 0.0
    expected = -torch.nn.functional.logsigmoid(gaps - margin).mean()
    assert metrics["loss"] == pytest.approx(float(expected.detach()), abs=1e-5)
    torch.testing.assert_close(chosen - rejected, gaps.detach(), atol=1e-4, rtol=1e-4)


def test_micro_batches_change_no_result(model_dir: str, pairs_file: str, tmp_path: Path) -> None:
    whole, cut = reward(model_dir, pairs_file, tmp_path), reward(model_dir, pairs_file, tmp_path, "--micro_batch_tokens", "60")
    for step in (1, 2):
        a, b = whole.step(step, Silent()), cut.step(step, Silent())
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), abs=1e-5)
        assert float(a["grad_norm"]) == pytest.approx(float(b["grad_norm"]), abs=1e-4)


def test_it_learns_and_keeps_what_standardises_it(model_dir: str, pairs_file: str, tmp_path: Path) -> None:
    ours = reward(model_dir, pairs_file, tmp_path, "--data.held_out_share", "0.2")
    assert len(ours.held_out or []) == 11
    for step in range(1, 31):
        ours.step(step, Silent())
    after = ours.evaluate(Silent())
    assert float(after["accuracy"]) > 0.9 and after["examples"] == 11
    ours.export(tmp_path / "rm")
    again = load_scalar_model(tmp_path / "rm")
    assert (again.mean, again.std) == (ours.model.mean, ours.model.std) != (0.0, 1.0)


def test_lora_is_refused(model_dir: str, pairs_file: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.lora\.rank: reward models are trained whole"):
        reward(model_dir, pairs_file, tmp_path, "--model.lora.rank", "2")
