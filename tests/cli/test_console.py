"""The console: plain lines in a pipe, a live view on a terminal that does not hold the loop up."""

from __future__ import annotations

import io
import time

import pytest
from fastrlhf.cli import console as module
from fastrlhf.cli.console import Console, LiveConsole, choose, number
from fastrlhf.training.progress import Progress, Silent


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


METRICS = {"seconds/step": 2.0, "odd": 1.0, "kl/ref": 0.0123456, "reward/mean": 0.41}


def play(progress: Progress) -> None:
    progress.stage("ppo", 2)
    for step in (1, 2):
        with progress.phase("generate", 3) as phase:
            phase.advance(2)
            phase.advance()
        with progress.phase("train") as phase:
            phase.advance(0.5)
        progress.step(step, METRICS | {"reward/mean": 0.41 + step})
    progress.samples([{"prompt": "[bold]what", "completion": "yes\n[/x]", "reward": 0.5}])
    progress.table("Before [and] after", ["", "SFT"], [["exact", 0.25], ["n", None]])
    progress.message("written to [/tmp] run")
    progress.close()


def test_a_pipe_gets_plain_lines():
    stream = io.StringIO()
    console = Console(stream=stream)
    assert type(console) is Console
    play(console)
    assert stream.getvalue().splitlines() == [
        "== ppo, 2 steps",
        "step 1/2 | reward/mean 1.41 | kl/ref 0.01235 | seconds/step 2",
        "step 2/2 | reward/mean 2.41 | kl/ref 0.01235 | seconds/step 2",
        "sample | reward 0.5 | '[bold]what' -> 'yes\\n[/x]'",
        "Before [and] after",
        "          SFT",
        "  exact  0.25",
        "  n",
        "written to [/tmp] run",
    ]


def test_a_terminal_gets_the_live_view(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "dumb-but-not-really")
    monkeypatch.setattr(module, "INTERVAL", 0.0)
    stream = Terminal()
    console = Console(stream=stream)
    assert type(console) is LiveConsole
    play(console)
    shown = stream.getvalue()
    for part in (
        "ppo",
        "generate",
        "2/3",
        "3/3",
        "train",
        "2/2",
        "reward/mean",
        "2.41",
        "↑",
        "1.41",
        "[bold]what",
        "[/x]",
        "reward 0.5",
        "Before [and] after",
        "0.25",
        "written to [/tmp] run",
    ):
        assert part in shown, part
    assert "odd" not in shown and "[dim]" not in shown
    assert shown.endswith("\x1b[?25h"), "the cursor is not back"


def test_the_live_view_does_not_hold_the_loop_up(monkeypatch):
    console = LiveConsole(stream=Terminal())
    drawn = []
    monkeypatch.setattr(console, "_view", lambda: drawn.append(1) or "")
    console.stage("ppo", 10_000)
    start = time.monotonic()
    with console.phase("generate", 10_000) as phase:
        for step in range(10_000):
            phase.advance()
            if step % 10 == 0:
                console.step(step, METRICS)
    elapsed = time.monotonic() - start
    console.close()
    assert len(drawn) <= 4 + elapsed / 0.25, "redrawn more than four times a second"
    assert elapsed < 2, "0.2 ms for each call is too much"


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_any_order_of_calls(stream):
    """A loop that fails before its first stage, closes twice, or starts a second stage."""
    console = Console(stream=stream())
    console.message("before")
    with console.phase("generate"):
        pass
    console.step(1, {})
    console.close()
    console.stage("sft", None)
    console.stage("ppo", 3)
    with pytest.raises(ZeroDivisionError), console.phase("generate", 3):
        1 / 0  # noqa: B018
    console.close()
    console.close()


def test_silence():
    play(Silent())


def test_which_metrics_and_how():
    assert list(choose({"b": 1, "a/x": 2, "c": 3}, ("a/*", "b", "*"), 2)) == ["a/x", "b"]
    shown = [number(x) for x in (0.0, 12.0, 0.123456, 1e-5, -2e-5, 12345.6, 1e9, float("nan"), float("inf"), -3.0)]
    assert shown == ["0", "12", "0.1235", "1.0e-05", "-2.0e-05", "12346", "1.0e+09", "nan", "inf", "-3"]
