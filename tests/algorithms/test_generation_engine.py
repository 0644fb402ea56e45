"""Runs whose completions are drawn by another engine than the trainer's own model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastrlhf import LossStats
from fastrlhf.algorithms.grpo import GroupRelative, GRPOConfig
from fastrlhf.algorithms.ppo import PPO, PPOConfig
from fastrlhf.cli.main import main
from fastrlhf.config import load
from fastrlhf.training.progress import Silent

KINDS: dict[str, Any] = {"ppo": (PPO, PPOConfig), "grpo": (GroupRelative, GRPOConfig)}


def run(kind: str, words: list[str]) -> tuple[list[dict[str, Any]], list[Any], dict[str, torch.Tensor]]:
    """Metrics of three steps and an evaluation before and after, samples, and the weights at the end."""
    algorithm, config = KINDS[kind]
    made = algorithm(load(config, None, words))
    try:
        found = [dict(made.evaluate(Silent()))]
        found += [dict(made.step(i, Silent())) for i in (1, 2, 3)]
        found.append(dict(made.evaluate(Silent())))
        weights = {n: p.detach().clone() for n, p in made.policy.model.named_parameters()}
        return found, made.samples(), weights
    finally:
        made.close()


def numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    """Without what refits took."""
    return {k: v.to_dict() if isinstance(v, LossStats) else v for k, v in metrics.items() if "refit" not in k}


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("ppo", ["--generation.verify", "true"]),
        (
            "grpo",
            ["--completions_per_prompt", "3", "--sampling.stop", "cat", "--generation.slots", "1", "--model.dtype", "bfloat16"],
        ),
    ],
)
def test_a_run_with_the_engine_in_its_own_process_is_the_run_in_one_process(
    kind: str, more: list[str], on_policy: Callable[..., list[str]], prompts_file: str
) -> None:
    words = on_policy("--data.held_out", prompts_file, "--data.held_out_limit", "4", *more)
    one, samples, weights = run(kind, words)
    two, other_samples, other = run(kind, [*words, "--generation.engine", "embedded-process"])
    for x, y in zip(one, two, strict=True):
        assert numbers(x) == numbers(y)
    assert samples == other_samples
    assert all(torch.equal(weights[n], other[n]) for n in weights)
    for step in (1, 2, 3):
        x, y = one[step], two[step]
        assert x["refit/version"] == y["refit/version"] == step - 1
        assert x["refit/bytes"] == y["refit/bytes"] == y["refit/bytes_copied"] == sum(w.nbytes for w in weights.values())
        assert x["refit/bytes_copied"] == 0 and y["refit/seconds"] > 0


@pytest.mark.parametrize(("name", "package"), [("vllm", "vllm"), ("sglang", "sglang"), ("tensorrt-llm", "tensorrt_llm")])
def test_an_engine_that_is_not_installed_is_named(
    name: str, package: str, on_policy: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        __import__(package)
        pytest.skip(f"{package} is here")
    except ImportError:
        pass
    assert main(["train", "ppo", *on_policy("--generation.engine", name)]) == 2
    error = capsys.readouterr().err
    assert f"generation.engine: {name}" in error and package in error and len(error.strip().splitlines()) == 1


def test_an_engine_that_there_is_not_is_refused(
    on_policy: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "ppo", *on_policy("--generation.engine", "guess")]) == 2
    assert "generation.engine: expected one of 'embedded', 'embedded-process'" in capsys.readouterr().err
