"""Whole runs over several processes: saved under one layout and resumed under another, exported, and killed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from fastrlhf.cli.main import main

from .processes import LAYOUTS, QWEN, launch, make_data, make_model, parallel_words

pytest.importorskip("transformers")
PHASES = (
    "generate", "score", "logprobs", "reference", "values", "policy", "critic", "save", "export",
)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    directory = tmp_path_factory.mktemp("files")
    return make_model(directory / "model", QWEN), make_data(directory)


def words(files: tuple[str, dict[str, str]], directory: Path, layout: str, *more: str) -> list[str]:
    options: dict[str, Any] = {} if layout == "one" else LAYOUTS[layout][1]
    return [
        "train", "ppo", "--run.directory", str(directory), "--run.tensorboard", "false", "--run.save_every", "1",
        "--model.path", files[0], "--data.path", files[1]["prompts"], "--data.max_prompt_tokens", "40", "--rewards",
        '[{"function": "tests.trainer:letters"}]', "--steps", "4", "--prompts_per_step", "5", "--sampling.max_tokens", "10",
        "--update.optimizer.lr", "1e-3", "--update.optimizer.eps", "1e-4", "--critic.optimizer.eps", "1e-4",
        "--critic.optimizer.lr", "1e-3", "--update.epochs", "2", *parallel_words(options), *more,
    ]  # fmt: skip


def run(files: tuple[str, dict[str, str]], directory: Path, layout: str, *more: str) -> None:
    if layout == "one":
        assert main(words(files, directory, layout, *more)) == 0
        return
    directory.mkdir(exist_ok=True)
    for status, text in launch(LAYOUTS[layout][0], words(files, directory, layout, *more), directory):
        assert status == 0, text


def metrics(directory: Path) -> list[dict[str, float]]:
    """Of each step, without what differs from run to run."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    own = ("time", "seconds/", "tokens_per_second/", "generate/idle", "peak_memory", "refit/")  # of a moment, of a process
    return [{k: v for k, v in line.items() if not k.startswith(own)} for line in lines]


def same(ours: Path, theirs: Path, tolerance: float = 1e-4) -> None:
    for a, b in zip(metrics(ours), metrics(theirs), strict=True):
        assert a == pytest.approx(b, abs=tolerance), a["step"]


def checksums(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def alone(files: tuple[str, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps in one process, never stopped."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    run(files, directory, "one")
    return directory


@pytest.mark.slow
def test_a_run_goes_on_under_any_other_layout(files: tuple[str, dict[str, str]], alone: Path, tmp_path: Path) -> None:
    # a time limit of nothing stops a run after each step
    layouts = ["tp2 pp2", "dp2", "tp4", "one"]
    for layout in layouts:
        more = ["--run.time_limit", "0"] if layout != layouts[-1] else []
        run(files, tmp_path / "run", layout, "--run.resume", "auto", *more)
    same(tmp_path / "run", alone)


def test_what_one_process_saved_goes_on_in_four(files: tuple[str, dict[str, str]], alone: Path, tmp_path: Path) -> None:
    run(files, tmp_path / "run", "one", "--run.time_limit", "0")
    run(files, tmp_path / "run", "tp2 pp2", "--run.resume", "auto")
    same(tmp_path / "run", alone)


@pytest.mark.slow
def test_a_run_goes_on_within_the_critics_warm_up(files: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    warm = ("--critic.warmup_steps", "2", "--steps", "3")
    run(files, tmp_path / "alone", "one", *warm)
    for layout in ("one", "dp2", "tp2"):
        more = ["--run.time_limit", "0"] if layout != "tp2" else []
        run(files, tmp_path / "run", layout, "--run.resume", "auto", *warm, *more)
    same(tmp_path / "run", tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2 pp2", "pp2 interleaved", "tp2 dp2"])
def test_the_export_is_that_of_one_process(files: tuple[str, dict[str, str]], layout: str, tmp_path: Path) -> None:
    """Bitwise: a learning rate of 0 leaves the weights alone, so that only the export can differ."""
    still = ["--update.optimizer.lr", "0", "--critic.optimizer.lr", "0", "--steps", "1"]
    run(files, tmp_path / "one", "one", *still)
    run(files, tmp_path / "many", layout, *still)
    assert checksums(tmp_path / "many/final/critic") == checksums(tmp_path / "one/final/critic")
    ours, theirs = (tmp_path / name / "final" for name in ("many", "one"))
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def killed_then_resumed(
    files: tuple[str, dict[str, str]], alone: Path, directory: Path, layout: str, victim: int, phase: str, how: str = "SIGKILL"
) -> None:
    step = 4 if phase == "export" else 2
    world = LAYOUTS[layout][0]
    run_directory = directory / "run"
    run_directory.mkdir()
    begun = launch(
        world, words(files, run_directory, layout, "--parallel.silence", "3"), directory, kill=(victim, step, phase, how)
    )
    for rank, (status, text) in enumerate(begun):
        if rank == victim:
            assert status == -9 or how == "raise"
        else:
            assert status not in (0, -9) and f"rank {victim} (" in text, (rank, status, text)
    run(files, run_directory, layout, "--run.resume", "auto")
    same(run_directory, alone)


def test_a_process_that_dies_is_named_by_all_others(files: tuple[str, dict[str, str]], alone: Path, tmp_path: Path) -> None:
    killed_then_resumed(files, alone, tmp_path, "tp2 pp2", 3, "policy")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("phase", PHASES)
def test_a_kill_in_any_phase(files: tuple[str, dict[str, str]], alone: Path, tmp_path: Path, phase: str, victim: int) -> None:
    killed_then_resumed(files, alone, tmp_path, "dp2" if PHASES.index(phase) % 2 else "tp2", victim, phase)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGSTOP", "raise"])
def test_a_process_that_stops_or_fails_alone(files: tuple[str, dict[str, str]], alone: Path, tmp_path: Path, how: str) -> None:
    killed_then_resumed(files, alone, tmp_path, "dp2", 1, "policy", how)


def test_an_error_of_a_reward_is_everyones(files: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    rewards = ["--rewards", '[{"function": "tests.parallel.processes:refuses"}]']
    ended = launch(2, words(files, tmp_path / "run", "tp2", *rewards), tmp_path)
    assert ["there is no checkpoint yet" in text for _, text in ended] == [True, False]  # the first alone looks
    for status, text in ended:
        assert status == 2 and "reward 'refuses': the function raised ValueError: no reward for 5 completions" in text, text
