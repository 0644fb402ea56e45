"""Whole runs over several processes: saved under one layout and resumed under another, exported, and killed."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fastrlhf.cli.main import main
from fastrlhf.models import export, load_decoder, save_decoder
from fastrlhf.training.layout import Layout, ParallelConfig

from .processes import LAYOUTS, QWEN, launch, make_data, make_model, parallel_words, spawn

pytest.importorskip("transformers")
PHASES = (
    "generate", "score", "logprobs", "reference", "values", "policy", "critic", "save", "export",
)  # fmt: skip
KILLS = [
    *((phase, "dp2" if i % 2 else "tp2", victim) for i, phase in enumerate(PHASES) for victim in (0, 1)),
    *((phase, "pp2", 1) for phase in ("generate", "save", "export")),
    ("start", "pp2", 0), ("start", "tp2", 1), ("report", "dp2", 0),
]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    directory = tmp_path_factory.mktemp("files")
    return make_model(directory / "model", QWEN), make_data(directory)


def words(files: tuple[str, dict[str, str]], directory: Path, layout: str, *more: str) -> list[str]:
    options: dict[str, Any] = {} if layout == "one" else LAYOUTS[layout][1]
    return [
        "train", "ppo", "--run.directory", str(directory), "--run.tensorboard", "false", "--run.report", "false", "--run.save_every", "1",
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
@pytest.mark.parametrize("layouts", [["tp2 pp2", "dp2", "tp4", "one"], ["tp2 pp2", "tp4"]], ids=" to ".join)
def test_a_run_goes_on_under_any_other_layout(
    files: tuple[str, dict[str, str]], alone: Path, tmp_path: Path, layouts: list[str]
) -> None:
    # a time limit of nothing stops a run after each step
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
    more = ("--parallel.silence", "3", "--run.report", str(phase == "report").lower())
    begun = launch(world, words(files, run_directory, layout, *more), directory, kill=(victim, step, phase, how))
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
@pytest.mark.parametrize(("phase", "layout", "victim"), KILLS)
def test_a_kill_in_any_phase(
    files: tuple[str, dict[str, str]], alone: Path, tmp_path: Path, phase: str, layout: str, victim: int
) -> None:
    killed_then_resumed(files, alone, tmp_path, layout, victim, phase)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "phase", "victim"),
    [("SIGSTOP", "policy", 1), ("raise", "policy", 1), ("raise", "start", 1), ("raise", "report", 0)],
)
def test_a_process_that_stops_or_fails_alone(
    files: tuple[str, dict[str, str]], alone: Path, tmp_path: Path, how: str, phase: str, victim: int
) -> None:
    killed_then_resumed(files, alone, tmp_path, "dp2", victim, phase, how)


def slow_export(rank: int, model: str, directory: str) -> float:
    """Seconds that an export takes whose every file takes longer than an exchange may."""
    layout = Layout.create(ParallelConfig(timeout=2))
    decoder = load_decoder(model, **layout.of(model))
    write = export._write

    def slowly(held: dict[str, torch.Tensor], file: Path) -> None:
        time.sleep(3)
        write(held, file)

    export._write = slowly
    begun = time.monotonic()
    save_decoder(decoder, directory, max_shard_bytes=60_000)
    return time.monotonic() - begun


def test_an_export_takes_longer_than_an_exchange(files: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    took = spawn(2, slow_export, files[0], str(tmp_path / "out"), timeout=2)
    written = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(written) >= 2 and min(took) >= 3 * len(written)


def no_room(rank: int, model: str, directory: str) -> str:
    layout = Layout.create(ParallelConfig())
    decoder = load_decoder(model, **layout.of(model))
    Path(directory).touch()  # a file where the directory is to be
    with pytest.raises(OSError) as error:
        save_decoder(decoder, directory)
    return str(error.value)


def test_an_export_that_fails_fails_everywhere(files: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    first, second = spawn(2, no_room, files[0], str(tmp_path / "out"))
    assert first == second and "out" in first


def test_an_error_of_a_reward_is_everyones(files: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    rewards = ["--rewards", '[{"function": "tests.parallel.processes:refuses"}]']
    ended = launch(2, words(files, tmp_path / "run", "tp2", *rewards), tmp_path)
    assert ["there is no checkpoint yet" in text for _, text in ended] == [True, False]  # the first alone looks
    for status, text in ended:
        assert status == 2 and "reward 'refuses': the function raised ValueError: no reward for 5 completions" in text, text
