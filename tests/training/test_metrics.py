"""Metrics: every line is valid JSON, on disk at once, and a resumed run's file is that of one never stopped."""

from __future__ import annotations

import json
import math
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from fastrlhf import LossStats
from fastrlhf.training.metrics import Metrics, read_lines, read_tables, to_floats
from fastrlhf.training.timers import Timers


def lines(directory: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    strict = json.JSONDecoder(parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    found = [strict.decode(line) for line in (directory / name).read_text().splitlines()]
    for line in found:
        line.pop("time", None)
    return found


def test_one_line_a_step_on_disk_at_once(tmp_path):
    metrics = Metrics(tmp_path / "new" / "run", tensorboard=False)
    stats = LossStats(torch.tensor([0.5, 2.0]), ("kl", "tokens"))
    numbers = metrics.log(3, {"loss": torch.tensor(0.25), "policy": stats, "lr": 1e-5, "count": torch.tensor([7]), "n": 2})
    expected = {"loss": 0.25, "policy/kl": 0.5, "policy/tokens": 2.0, "lr": 1e-5, "count": 7.0, "n": 2.0}
    assert numbers == expected and list(numbers) == list(expected)
    assert lines(tmp_path / "new" / "run") == [{"step": 3} | expected]
    metrics.log(3, {"accuracy": 0.5}, phase="eval")
    assert lines(tmp_path / "new" / "run")[1] == {"step": 3, "phase": "eval", "accuracy": 0.5}
    metrics.close()


def test_devices_are_read_once(monkeypatch):
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (reads.append(self.shape), tolist(self))[1])
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("one transfer for each metric"))
    values = {str(i): torch.tensor(float(i)) for i in range(5)} | {"s": LossStats(torch.ones(3), ("a", "b", "c"))}
    assert to_floats(values) == {"0": 0, "1": 1, "2": 2, "3": 3, "4": 4, "s/a": 1, "s/b": 1, "s/c": 1}
    assert reads == [(8,)]


def test_floats_are_exact(tmp_path):
    metrics = Metrics(tmp_path, tensorboard=False)
    metrics.log(0, {"a": 0.1, "b": torch.tensor(0.1), "c": torch.tensor(2**24 + 1, dtype=torch.int64)})
    assert lines(tmp_path) == [{"step": 0, "a": 0.1, "b": torch.tensor(0.1).item(), "c": 2.0**24 + 1}]


def test_what_is_not_finite(tmp_path):
    metrics = Metrics(tmp_path, tensorboard=False)
    with pytest.warns(UserWarning, match="step 4: metric loss is nan"):
        numbers = metrics.log(4, {"loss": math.nan, "kl": 1.0})
    assert math.isnan(numbers["loss"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics.log(5, {"loss": torch.tensor(math.nan)})  # warned of once
    with pytest.warns(UserWarning, match="step 6: metric kl is -inf"):
        metrics.log(6, {"loss": 1.0, "kl": -math.inf})
    assert lines(tmp_path) == [
        {"step": 4, "loss": None, "kl": 1.0, "not_finite": {"loss": "nan"}},
        {"step": 5, "loss": None, "not_finite": {"loss": "nan"}},
        {"step": 6, "loss": 1.0, "kl": None, "not_finite": {"kl": "-inf"}},
    ]


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.ones(2), ValueError, r"x: expected a tensor of one element, got shape \(2,\)"),
        ("1", TypeError, "x: expected a number, .* got str"),
        (None, TypeError, "x: expected a number, .* got NoneType"),
    ],
)
def test_what_is_no_metric(value, error, message, tmp_path):
    with pytest.raises(error, match=message):
        Metrics(tmp_path, tensorboard=False).log(0, {"x": value})


def run(metrics: Metrics, first: int, last: int) -> None:
    for step in range(first, last):
        metrics.log(step, {"loss": step / 3})
        metrics.log(step, {"accuracy": step / 7}, phase="eval")
        metrics.samples(
            step, [{"prompt": "é", "completion": "b\n", "reward": torch.tensor(0.5)}, {"prompt": "c", "reward": math.nan}]
        )


@pytest.mark.parametrize("torn", ['{"step": 9, "lo', '{"step": 9}', '{"step": 3}', "\x00\x00", ""])
@pytest.mark.parametrize("resumed_at", [0, 4, 6])
def test_a_resumed_run_has_the_file_of_one_never_stopped(resumed_at, torn, tmp_path):
    never = Metrics(tmp_path / "never", tensorboard=False)
    run(never, 0, 9)
    killed = Metrics(tmp_path / "killed", tensorboard=False)
    run(killed, 0, 6)
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write(torn)  # no newline: the process ended here
    resumed = Metrics(tmp_path / "killed", tensorboard=False)
    resumed.truncate(resumed_at)
    run(resumed, resumed_at, 9)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert lines(tmp_path / "killed", name) == lines(tmp_path / "never", name)
    assert (tmp_path / "killed/samples.jsonl").read_bytes() == (tmp_path / "never/samples.jsonl").read_bytes()
    assert not list((tmp_path / "killed").glob("*.tmp"))


def test_truncating_in_the_middle_of_a_run(tmp_path):
    metrics = Metrics(tmp_path)
    run(metrics, 0, 5)
    metrics.truncate(2)
    run(metrics, 2, 4)
    metrics.close()
    assert [line["step"] for line in lines(tmp_path) if "phase" not in line] == [0, 1, 2, 3]


def test_reading_a_file_that_is_being_written(tmp_path):
    assert read_lines(tmp_path / "none") == [] and read_tables(tmp_path) == []
    (tmp_path / "m").write_text('{"step": 1}\nnonsense\n{"step": 2}\n{"step"')
    assert read_lines(tmp_path / "m") == [{"step": 1}, {"step": 2}]


def test_tables(tmp_path):
    metrics = Metrics(tmp_path, tensorboard=False)
    metrics.table("a", ["x"], [[1]])
    metrics.table("b", ["x"], [[2]])
    metrics.table("a", ["x", "y"], [["n", 0.5]])
    assert read_tables(tmp_path) == [
        {"title": "b", "columns": ["x"], "rows": [[2]]},
        {"title": "a", "columns": ["x", "y"], "rows": [["n", 0.5]]},
    ]


def test_tensorboard_shows_a_resumed_run_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = Metrics(tmp_path)
    run(first, 0, 6)
    first.close()
    second = Metrics(tmp_path)
    second.truncate(4)
    run(second, 4, 9)
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "eval/accuracy"}
    assert [event.step for event in events.Scalars("loss")] == list(range(9))
    assert events.Scalars("loss")[3].value == pytest.approx(1.0)


def test_wandb_goes_on_with_its_run(tmp_path, monkeypatch):
    calls: list[Any] = []

    class Run:
        def define_metric(self, *a: Any, **k: Any) -> None:
            calls.append((a, k))

        def log(self, values: dict[str, float]) -> None:
            calls.append(values)

        def finish(self) -> None:
            calls.append("finish")

    starts: list[dict[str, Any]] = []
    fake: Any = types.ModuleType("wandb")
    fake.init = lambda **k: (starts.append(k), Run())[1]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (1, 2):
        metrics = Metrics(tmp_path, tensorboard=False, wandb="project", config={"lr": 1})
        metrics.log(step, {"loss": 0.5}, phase="eval")
        metrics.close()
    assert starts[0]["id"] == starts[1]["id"] and starts[1]["resume"] == "allow" and starts[0]["project"] == "project"
    assert starts[0]["config"] == {"lr": 1} and {"eval/loss": 0.5, "step": 2} in calls and calls[-1] == "finish"


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install 'fastrlhf\[train\]'"):
        Metrics(tmp_path)
    with pytest.raises(ImportError, match=r"wandb: .*pip install 'fastrlhf\[wandb\]'"):
        Metrics(tmp_path, tensorboard=False, wandb="p")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_timers():
    clock = Clock()
    timers = Timers(clock=clock)
    with timers("generate", tokens=30):
        clock.now += 2
    clock.now += 1
    with timers("train"):
        clock.now += 1
        with timers("generate"):  # inside: not the outer one's
            clock.now += 1
        clock.now += 1
    timers.count("train", 10)
    assert timers.pop() == {
        "seconds/generate": 3.0, "seconds/train": 2.0, "tokens_per_second/generate": 10.0, "tokens_per_second/train": 5.0,
        "seconds/step": 6.0,
    }  # fmt: skip
    assert timers.pop() == {"seconds/step": 0.0}


def test_timers_inside_a_phase_and_through_errors():
    clock = Clock()
    timers = Timers(clock=clock)
    with pytest.raises(ZeroDivisionError), timers("a", tokens=5):
        clock.now += 1
        1 / 0  # noqa: B018
    with timers("b"):
        clock.now += 1
        assert timers.pop() == {"seconds/a": 1.0, "seconds/b": 1.0, "seconds/step": 2.0}
        clock.now += 4
    assert timers.pop() == {"seconds/b": 4.0, "seconds/step": 4.0}


def test_timers_wait_for_the_device():
    waits = []
    timers = Timers(synchronize=lambda: waits.append(1))
    with timers("a"):
        assert len(waits) == 1
    assert len(waits) == 2
