"""The loss is that of the answers alone, the same however the batch is cut, and it falls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fastrlhf.algorithms.sft import SFT, SFTConfig
from fastrlhf.config import load
from fastrlhf.training.progress import Silent

transformers = pytest.importorskip("transformers")


def sft(model_dir: str, sft_file: str, directory: Path, *more: str) -> SFT:
    return SFT(load(SFTConfig, None, [
        "--run.directory", str(directory), "--model.path", model_dir, "--data.path", sft_file, "--batch_size", "8",
        "--optimizer.lr", "3e-3", "--optimizer.warmup_steps", "0", "--steps", "30", *more,
    ]))  # fmt: skip


def test_the_loss_is_transformers_over_the_answers(model_dir: str, sft_file: str, tmp_path: Path) -> None:
    ours = sft(model_dir, sft_file, tmp_path)
    batch = ours.stream.next(8)
    loss = ours.accumulate(batch)["loss"]
    hf = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    total, count = torch.zeros(()), 0
    for c in batch:
        labels = torch.tensor([c.tokens]).masked_fill(~torch.tensor([c.loss_mask]), -100)
        n = int((labels[:, 1:] != -100).sum())
        total, count = total + hf(torch.tensor([c.tokens]), labels=labels).loss * n, count + n
    (total / count).backward()
    assert loss == pytest.approx(float(total.detach() / count), abs=1e-5)
    grad = dict(hf.named_parameters())["model.layers.1.mlp.down_proj.weight"].grad
    assert (ours.model.layers[1].mlp.down_proj.weight.grad - grad).abs().max() < 1e-6


def test_micro_batches_change_no_result(model_dir: str, sft_file: str, tmp_path: Path) -> None:
    whole, cut = sft(model_dir, sft_file, tmp_path), sft(model_dir, sft_file, tmp_path, "--micro_batch_tokens", "30")
    for step in (1, 2):
        a, b = whole.step(step, Silent()), cut.step(step, Silent())
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), abs=1e-5)
        assert float(a["grad_norm"]) == pytest.approx(float(b["grad_norm"]), abs=1e-4)


def test_the_answer_tokens_are_counted(model_dir: str, sft_file: str, tmp_path: Path) -> None:
    ours = sft(model_dir, sft_file, tmp_path)
    expected = sum(sum(c.loss_mask) for c in sft(model_dir, sft_file, tmp_path).stream.next(8))
    assert ours.step(1, Silent())["answer_tokens"] == expected


def test_the_loss_falls(model_dir: str, sft_file: str, tmp_path: Path) -> None:
    ours = sft(model_dir, sft_file, tmp_path, "--data.held_out", sft_file)
    before = float(ours.evaluate(Silent())["loss"])
    for step in range(1, 31):
        ours.step(step, Silent())
    assert float(ours.evaluate(Silent())["loss"]) < 0.6 * before
