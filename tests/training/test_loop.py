"""A run that was killed and resumed is the run that never was; what goes wrong is named and loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fastrlhf.cli.main import main
from fastrlhf.cli.train import configure, train
from fastrlhf.data import load_tokenizer
from fastrlhf.errors import CheckpointError, ConfigError, UserError
from fastrlhf.models import Decoder, read_config, save_decoder
from fastrlhf.training import checkpoint
from fastrlhf.training.optim import NotFinite
from fastrlhf.training.progress import Silent

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
BROKEN: dict[str, Any] = {}


def moody(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """A reward that fails when told to."""
    BROKEN["calls"] = BROKEN.get("calls", 0) + 1
    if BROKEN.get("at") == BROKEN["calls"]:
        raise RuntimeError("out of sorts")
    return [len(c) / 10 for c in completions]


@pytest.fixture(autouse=True)
def _whole() -> None:
    BROKEN.clear()


def run(algorithm: str, words: list[str]) -> Any:
    return train(algorithm, configure(algorithm, words), progress=Silent())


def lines(directory: Path) -> list[dict[str, Any]]:
    """Metrics without times and memory."""
    found = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time" and "second" not in k and "memory" not in k} for line in found]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for path in sorted((directory / "final").rglob("*.safetensors")):
        tensors |= {f"{path.parent.name}/{k}": v for k, v in load_file(path).items()}
    return tensors


def same_runs(a: Path, b: Path) -> None:
    assert lines(a) == lines(b)
    assert (a / "samples.jsonl").read_text() == (b / "samples.jsonl").read_text() if (a / "samples.jsonl").exists() else True
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys() and first
    assert all(torch.equal(t, second[n]) for n, t in first.items())


@pytest.fixture
def supervised(model_dir: str, sft_file: str, pairs_file: str, tmp_path: Path) -> Callable[..., list[str]]:
    def words(algorithm: str, directory: str) -> list[str]:
        return [
            "--run.directory", str(tmp_path / directory), "--run.tensorboard", "false", "--run.report", "false", "--model.path", model_dir,
            "--data.path", sft_file if algorithm == "sft" else pairs_file, "--steps", "4", "--batch_size", "6",
        ]  # fmt: skip

    return words


@pytest.mark.parametrize("algorithm", ["sft", "reward"])
def test_supervised_resumes_to_the_bit(algorithm: str, supervised: Callable[..., list[str]], tmp_path: Path) -> None:
    run(algorithm, supervised(algorithm, "whole"))
    first = run(algorithm, [*supervised(algorithm, "cut"), "--run.save_every", "1", "--run.time_limit", "0.001"])
    assert not first.finished and first.steps == 1
    assert run(algorithm, [*supervised(algorithm, "cut"), "--resume", "auto"]).finished
    same_runs(tmp_path / "whole", tmp_path / "cut")


ON_POLICY = {
    "ppo": ["--update.minibatch_size", "3", "--kl.target", "1", "--critic.warmup_steps", "1", "--critic.optimizer.lr", "1e-3"],
    "grpo": ["--completions_per_prompt", "3", "--update.optimizer.schedule", "linear"],
    "rloo": ["--completions_per_prompt", "2", "--model.lora.rank", "2"],
}


@pytest.mark.parametrize("algorithm", ON_POLICY)
def test_on_policy_resumes_to_the_bit(
    algorithm: str, on_policy: Callable[..., list[str]], prompts_file: str, tmp_path: Path
) -> None:
    more = [*ON_POLICY[algorithm], "--data.held_out", prompts_file, "--data.held_out_limit", "5", "--run.eval_every", "2"]
    run(algorithm, on_policy(*more, directory="whole"))
    steps = 0
    for _ in range(3):  # one step at a time
        result = run(algorithm, on_policy(*more, "--run.time_limit", "0.001", "--resume", "auto", directory="cut"))
        assert result.steps == (steps := steps + 1)
    assert result.finished
    same_runs(tmp_path / "whole", tmp_path / "cut")


def command(words: list[str]) -> list[str]:
    return [sys.executable, "-m", "fastrlhf", "train", "ppo", *words]


def test_killed_at_any_point_it_resumes_to_the_bit(on_policy: Callable[..., list[str]], tmp_path: Path) -> None:
    more = ["--steps", "6", "--run.save_every", "1", "--run.threads", "1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command(on_policy(*more, directory="whole")), cwd=ROOT, check=True, capture_output=True, env=env)
    words = command(on_policy(*more, "--resume", "auto", directory="cut"))
    metrics = tmp_path / "cut" / "metrics.jsonl"
    for seen in (1, 3):
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") >= seen):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True, env=env)
    assert "resumed from" in done.stdout
    same_runs(tmp_path / "whole", tmp_path / "cut")


def test_asked_to_end_it_saves_first(on_policy: Callable[..., list[str]], tmp_path: Path) -> None:
    words = command(on_policy("--steps", "1000"))
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 2"):
            process.terminate()
            break
    rest = process.stdout.read()
    assert process.wait() == 0
    assert "asked to stop: saved step" in rest
    assert checkpoint.Checkpoints(tmp_path / "run" / "checkpoints").latest() is not None


def test_a_reward_that_fails_loses_nothing(on_policy: Callable[..., list[str]], tmp_path: Path) -> None:
    words = on_policy("--rewards.0.function", "tests.training.test_loop:moody")
    whole = on_policy("--rewards.0.function", "tests.training.test_loop:moody", directory="whole")
    run("ppo", whole)
    BROKEN.update(at=3, calls=0)
    with pytest.raises(UserError, match=r"step 3: reward 'moody': .*out of sorts; the last checkpoint is .*step-000002"):
        run("ppo", words)
    BROKEN.clear()
    run("ppo", [*words, "--resume", "auto"])
    same_runs(tmp_path / "whole", tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(
    on_policy: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastrlhf.training import policy

    real, calls = policy.policy_loss, [0]

    def sour(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        out = real(*args, **options)
        return out._replace(loss=out.loss * float("nan")) if calls[0] == 2 else out

    monkeypatch.setattr(policy, "policy_loss", sour)
    with pytest.raises(
        NotFinite, match=r"step 2: policy: the loss is nan, .*no weight was changed; the last checkpoint is .*step-000001"
    ):
        run("ppo", on_policy("--run.save_every", "1"))
    monkeypatch.undo()
    assert run("ppo", on_policy("--resume", "auto")).finished


def test_a_full_disk_keeps_the_checkpoint_before(
    on_policy: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, saves = checkpoint._save_file, [0]

    def full(tensors: Any, path: Path) -> None:
        saves[0] += 1
        if saves[0] > 7:  # within the second checkpoint
            raise OSError(28, "No space left on device", str(path))
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "_save_file", full)
    with pytest.raises(CheckpointError, match=r"could not be saved: No space left on device.*step-000001 is intact"):
        run("ppo", on_policy("--run.save_every", "1"))
    monkeypatch.undo()
    assert run("ppo", on_policy("--resume", "auto")).finished


def test_a_checkpoint_of_another_shape_is_refused(on_policy: Callable[..., list[str]], model_dir: str, tmp_path: Path) -> None:
    run("grpo", on_policy("--completions_per_prompt", "2"))
    wider = Decoder(replace(read_config(model_dir), intermediate_size=64)).initialize(0)
    save_decoder(wider, tmp_path / "wider", tokenizer=load_tokenizer(model_dir))
    words = on_policy(
        "--completions_per_prompt", "2", "--model.path", str(tmp_path / "wider"), "--resume", "auto", "--steps", "9"
    )
    with pytest.raises(CheckpointError, match=r"policy: .*has shape \(32, 48\) in the checkpoint, expected \(32, 64\)"):
        run("grpo", words)


def test_a_directory_that_holds_a_run_is_not_overwritten(
    on_policy: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("ppo", on_policy())
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert main(["train", "ppo", *on_policy()]) == 2
    assert "already holds a run; --run.resume auto goes on with it" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert run("ppo", on_policy("--run.overwrite", "true")).finished


def test_bad_configurations_and_data_are_named(
    on_policy: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "one"}\n{"prompt": \n')
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"prompt": "  "}\n')
    other = tmp_path / "other.jsonl"
    other.write_text('{"question": "one"}\n')
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "red blue " * 50}) + "\n")
    for more, message in (
        (["--kl.coeff", "1"], "kl.coeff: no such option; did you mean kl.coef?"),
        (["--sampling.max_tokens", "0"], "sampling.max_tokens"),
        (["--sampling.temperature", "0"], "sampling.temperature"),
        (["--update.loss.rollout_correction", "tiss"], "update.loss.rollout_correction"),
        (
            ["--data.max_prompt_tokens", "120"],
            "data.max_prompt_tokens: 120 and sampling.max_tokens 12 exceed the model's context of 128",
        ),
        (["--data.path", str(broken)], "broken.jsonl:2: "),
        (["--data.path", str(empty)], "empty.jsonl:1: the prompt is empty"),
        (["--data.path", str(other)], "other.jsonl:1: no field 'prompt'"),
        (["--data.path", str(long)], "no example in a whole epoch of 1 rows"),
        (["--data.path", str(long), "--data.overlong", "error"], "long.jsonl:1: the prompt has"),
        (["--data.path", str(tmp_path / "none.jsonl")], "none.jsonl"),
        (["--model.path", str(tmp_path)], "config.json does not exist"),
        (["--model.device", "gpu7"], "device: 'gpu7' cannot be used here"),
    ):
        assert main(["train", "ppo", *on_policy(*more)]) == 2, message
        assert message in capsys.readouterr().err
    with pytest.raises(ConfigError, match="train: expected one of sft"):
        run("pppo", [])


def test_prompts_that_are_too_long_are_counted(on_policy: Callable[..., list[str]], tmp_path: Path) -> None:
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(json.dumps({"prompt": "red " * (1 + 60 * (i % 2))}) + "\n" for i in range(40)))
    run("grpo", on_policy("--completions_per_prompt", "2", "--data.path", str(mixed)))
    assert lines(tmp_path / "run")[-1]["data/skipped"] > 0


def test_the_run_directory_has_everything(on_policy: Callable[..., list[str]], prompts_file: str, tmp_path: Path) -> None:
    words = on_policy(
        "--data.held_out", prompts_file, "--data.held_out_limit", "4", "--run.tensorboard", "true", "--run.report", "true"
    )
    result = run("ppo", words)
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "samples.jsonl",
        "report.html",
        "report.png",
        "final",
        "checkpoints",
        "tensorboard",
    } <= names
    assert result.before.keys() == result.after.keys() >= {"reward", "reward/letters", "kl", "completion_length/mean"}
    assert {"reward", "kl", "policy/clip_fraction_high", "policy/entropy", "explained_variance", "completion_length/mean",
            "policy/rollout_mismatch_mean"} <= lines(tmp_path / "run")[1].keys()  # fmt: skip
    assert "tokens_per_second/generate" in (tmp_path / "run" / "metrics.jsonl").read_text()
    again = on_policy("--config", str(tmp_path / "run" / "config.yaml"), directory="again")
    repeated = run("ppo", again)
    assert repeated.after == pytest.approx(result.after)
    assert result.report == tmp_path / "run" / "report.html"
    assert (
        repeated.report is None and not (tmp_path / "again" / "report.html").exists()
    )  # run.report false, as these tests have it


def test_a_rollout_of_which_nothing_counts_is_no_error(on_policy: Callable[..., list[str]], tmp_path: Path) -> None:
    words = on_policy("--score.unended", "mask", "--sampling.max_tokens", "1", "--completions_per_prompt", "2")
    assert run("grpo", words).finished
    assert all(line["policy/tokens"] >= 0 and "not_finite" not in line for line in lines(tmp_path / "run"))
