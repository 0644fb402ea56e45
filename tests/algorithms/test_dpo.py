"""Preference losses against their formulas on transformers' models; what stays the same however a batch is cut; it learns."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastrlhf.algorithms.dpo import DPO, DPOConfig
from fastrlhf.cli.main import main
from fastrlhf.config import ConfigError, load
from fastrlhf.data import Preference
from fastrlhf.training.metrics import to_floats
from fastrlhf.training.progress import Silent
from torch import Tensor

transformers = pytest.importorskip("transformers")

FORMULAS = {  # of Δ policy - reference of both sides, the pairs' margins, and β = 0.5, ε = 0.1, reward scale 2
    "dpo": lambda c, r, g: -F.logsigmoid(0.5 * (c - r)),
    "cdpo": lambda c, r, g: -0.9 * F.logsigmoid(0.5 * (c - r)) - 0.1 * F.logsigmoid(0.5 * (r - c)),
    "ipo": lambda c, r, g: (c - r - 1 / (2 * 0.5)) ** 2,
    "rpo_sq": lambda c, r, g: (0.5 * (c - r) - 2 * g) ** 2,
    "simpo": lambda c, r, g: -F.logsigmoid(0.5 * (c - r) - 0.3),
    "orpo": lambda c, r, g: -0.5 * F.logsigmoid((c - torch.log1p(-c.exp())) - (r - torch.log1p(-r.exp()))),
}
OPTIONS = {"cdpo": ["--loss.label_smoothing", "0.1"], "rpo_sq": ["--loss.reward_scale", "2"], "simpo": ["--loss.margin", "0.3"]}


def dpo(model_dir: str, pairs_file: str, directory: Path, *more: str) -> DPO:
    return DPO(load(DPOConfig, None, [
        "--run.directory", str(directory), "--model.path", model_dir, "--data.path", pairs_file, "--batch_size", "8",
        "--optimizer.lr", "3e-3", "--optimizer.warmup_steps", "0", "--steps", "30", *more,
    ]))  # fmt: skip


class Oracle:
    """The same in plain torch on transformers' models, one sequence at a time."""

    def __init__(self, policy: Path, reference: str) -> None:
        self.policy, self.reference = (transformers.AutoModelForCausalLM.from_pretrained(p) for p in (policy, reference))

    @staticmethod
    def logprob(model: Any, prompt: list[int], completion: list[int], average: bool) -> Tensor:
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        tokens = logits.log_softmax(-1).gather(-1, torch.tensor(completion).unsqueeze(-1))
        return tokens.mean() if average else tokens.sum()

    def loss(self, pairs: list[Preference], kind: str, sft_coef: float = 0.0) -> Tensor:
        alone = kind in ("simpo", "orpo")
        out = []
        for p in pairs:
            sides = []
            for completion in (p.chosen, p.rejected):
                value = self.logprob(self.policy, p.prompt, completion, alone)
                if not alone:
                    value = value - self.logprob(self.reference, p.prompt, completion, False).detach()
                sides.append(value)
            nll = -self.logprob(self.policy, p.prompt, p.chosen, True)
            out.append(FORMULAS[kind](*sides, torch.tensor(p.margin)) + sft_coef * nll)
        return torch.stack(out).mean()


@pytest.mark.parametrize("kind", list(FORMULAS))
def test_loss_and_gradient_are_the_formulas(model_dir: str, pairs_file: str, tmp_path: Path, kind: str) -> None:
    words = ["--loss.kind", kind, "--loss.beta", "0.5", "--loss.sft_coef", "0.2", *OPTIONS.get(kind, [])]
    ours = dpo(model_dir, pairs_file, tmp_path, "--micro_batch_tokens", "60", *words)
    ours.step(1, Silent())  # away from the reference
    ours.export(tmp_path / "policy")
    oracle = Oracle(tmp_path / "policy", model_dir)
    pairs = ours.stream.next(8)
    ours.model.zero_grad()
    metrics = ours.accumulate(pairs)
    expected = oracle.loss(pairs, kind, 0.2)
    assert metrics["loss"] == pytest.approx(float(expected.detach()), abs=2e-5)
    expected.backward()
    theirs = oracle.policy.model.layers[0].mlp.down_proj.weight.grad
    torch.testing.assert_close(ours.model.layers[0].mlp.down_proj.weight.grad, theirs, atol=2e-5, rtol=1e-3)


def test_at_first_policy_and_reference_are_one(model_dir: str, pairs_file: str, tmp_path: Path) -> None:
    """To the bit: a difference of two forwards would be there from the start and grow with β."""
    first = dpo(model_dir, pairs_file, tmp_path, "--micro_batch_tokens", "60").step(1, Silent())
    assert first["reward_margin"] == first["rewards/chosen"] == first["rewards/rejected"] == 0
    assert float(first["loss"]) == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize("kind", ["dpo", "orpo"])
def test_micro_batches_change_no_result(model_dir: str, pairs_file: str, tmp_path: Path, kind: str) -> None:
    words = ("--loss.kind", kind, "--loss.sft_coef", "0.1")
    whole, cut = (dpo(model_dir, pairs_file, tmp_path, "--micro_batch_tokens", n, *words) for n in ("9000", "60"))
    for step in (1, 2, 3):
        a, b = to_floats(whole.step(step, Silent())), to_floats(cut.step(step, Silent()))
        assert a == pytest.approx(b, abs=1e-4, rel=1e-4)


def test_it_learns(model_dir: str, pairs_file: str, tmp_path: Path) -> None:
    ours = dpo(model_dir, pairs_file, tmp_path, "--data.held_out_share", "0.2")
    before = ours.evaluate(Silent())
    assert before["loss"] == pytest.approx(math.log(2), abs=1e-6) and before["examples"] == 11
    for step in range(1, 31):
        ours.step(step, Silent())
    after = ours.evaluate(Silent())
    assert float(after["accuracy"]) > 0.9 and float(after["loss"]) < 0.4


def test_with_adapters_the_reference_is_the_base(model_dir: str, pairs_file: str, tmp_path: Path) -> None:
    ours = dpo(model_dir, pairs_file, tmp_path, "--model.lora.rank", "4")
    assert ours.reference is not None and ours.reference.copy is None
    first, second = ours.step(1, Silent()), ours.step(2, Silent())
    assert first["reward_margin"] == 0 != second["reward_margin"]


def test_without_a_reference_none_is_loaded(model_dir: str, pairs_file: str, tmp_path: Path) -> None:
    assert dpo(model_dir, pairs_file, tmp_path, "--loss.kind", "simpo").reference is None


def test_a_run_that_was_stopped_ends_with_the_same_bits(model_dir: str, pairs_file: str, tmp_path: Path) -> None:
    def run(directory: str, *more: str) -> None:
        words = [
            "--run.directory",
            str(tmp_path / directory),
            "--run.tensorboard",
            "false",
            "--run.report",
            "false",
            "--model.path",
            model_dir,
        ]
        words += ["--data.path", pairs_file, "--data.held_out", pairs_file, "--batch_size", "20", "--steps", "4"]
        assert main(["train", "dpo", *words, "--optimizer.lr", "1e-3", *more]) == 0

    run("whole")
    for limit in ("0", "1000"):
        run("stopped", "--run.resume", "auto", "--run.time_limit", limit)
    weights = [(tmp_path / d / "final" / "model.safetensors").read_bytes() for d in ("whole", "stopped")]
    assert weights[0] == weights[1]
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    evals = [line for line in lines if line.get("phase") == "eval"]
    assert evals[-1]["accuracy"] > evals[0]["accuracy"] and "peak_memory_gb" in lines[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--loss.kind", "cdpo"], r"loss\.label_smoothing: expected > 0 for cdpo, got 0"),
        (["--loss.label_smoothing", "0.5"], r"loss\.label_smoothing: expected < 0\.5, got 0\.5"),
        (
            ["--loss.kind", "orpo", "--loss.average", "false"],
            r"loss\.average: orpo is defined for log-probs by token, got false",
        ),
        (["--loss.kind", "kto"], r"loss\.kind: expected one of"),
    ],
)
def test_options_that_do_not_fit(model_dir: str, pairs_file: str, tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dpo(model_dir, pairs_file, tmp_path, *words)


def test_rpo_needs_margins(model_dir: str, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "red blue", "chosen": " red", "rejected": " blue"}\n')
    ours = dpo(model_dir, str(file), tmp_path, "--loss.kind", "rpo_sq", "--batch_size", "1")
    with pytest.raises(ConfigError, match=r"loss: rpo_sq needs a margin with every pair; row 0 of .*pairs\.jsonl"):
        ours.step(1, Silent())
