"""The loop on a terminal: bars, a table of metrics, samples; plain lines where the output is piped."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import IO, Any

from ..errors import extra
from ..training.progress import Phase, Silent

CHOSEN = (
    "reward", "reward/*", "loss", "*/loss", "loss/*", "*accuracy*", "kl", "kl/*", "*ref_kl", "*approx_kl_k3",
    "*clip_fraction*", "*entropy", "*explained_variance", "*length/mean", "*length", "*grad_norm", "lr", "*/lr",
    "tokens_per_second/*", "seconds/step",
)  # fmt: skip
LINE_METRICS, TABLE_METRICS, SAMPLES, SAMPLE_TEXT = 8, 18, 5, 600
INTERVAL = 0.25
"""Seconds between two drawings."""


def choose(metrics: Mapping[str, float], patterns: Sequence[str], most: int) -> dict[str, float]:
    """The metrics that match, in the order of the patterns."""
    names = dict.fromkeys(name for pattern in patterns for name in metrics if fnmatchcase(name, pattern))
    return {name: metrics[name] for name in list(names)[:most]}


def number(x: float) -> str:
    """Four digits at most, and never more than eight characters."""
    if not math.isfinite(x):
        return str(x)
    if x == int(x) and abs(x) < 1e6:
        return str(int(x))
    return f"{x:.1e}" if abs(x) < 1e-3 or abs(x) >= 1e6 else f"{x:.4g}" if abs(x) < 1e4 else f"{x:.0f}"


class Console(Silent):
    """A `Progress` of plain lines, one for each step; `Console(...)` is a `LiveConsole` where the stream is a terminal.

    Args:
        chosen: patterns of the metrics to show, the most important first.
        stream: where to; standard output by default.
    """

    def __new__(cls, chosen: Sequence[str] = CHOSEN, stream: IO[str] | None = None) -> Console:
        terminal = (sys.stdout if stream is None else stream).isatty()
        return super().__new__(LiveConsole if cls is Console and terminal else cls)

    def __init__(self, chosen: Sequence[str] = CHOSEN, stream: IO[str] | None = None) -> None:
        self._chosen = tuple(chosen)
        self._stream = sys.stdout if stream is None else stream
        self._total: int | None = None

    def stage(self, name: str, total_steps: int | None) -> None:
        self._total = total_steps
        self.message(f"== {name}" + (f", {total_steps} steps" if total_steps is not None else ""))

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        shown = choose(metrics, self._chosen, LINE_METRICS)
        of = f"/{self._total}" if self._total is not None else ""
        self.message(" | ".join([f"step {step}{of}", *(f"{name} {number(x)}" for name, x in shown.items())]))

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows[:SAMPLES]:
            self.message(f"sample | {caption(row)} | {str(row.get('prompt', ''))!r} -> {str(row.get('completion', ''))!r}")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        cells = [[str(c) for c in columns], *([cell(c) for c in row] for row in rows)]
        widths = [max(len(row[i]) for row in cells if i < len(row)) for i in range(len(columns))]
        self.message(title)
        for row in cells:
            first, *rest = (c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths)))
            self.message("  " + "  ".join([first, *rest]).rstrip())

    def message(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def cell(value: Any) -> str:
    return number(value) if isinstance(value, float) else "" if value is None else str(value)


def caption(row: Mapping[str, Any]) -> str:
    """What a sample has beyond its text."""
    return ", ".join(f"{k} {cell(v)}" for k, v in row.items() if k not in ("prompt", "completion", "step"))


class LiveConsole(Console):
    """A terminal: the bars of the stage and of the phase over a table of metrics, redrawn at most four times a second;
    samples, tables and messages scroll above. Same arguments as `Console`."""

    def __init__(self, chosen: Sequence[str] = CHOSEN, stream: IO[str] | None = None) -> None:
        super().__init__(chosen, stream)
        rich = extra("rich.console")
        self._rich = rich.Console(file=self._stream)
        bars = extra("rich.progress")
        columns = (
            bars.TextColumn("{task.description}", markup=False), bars.BarColumn(30), bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(), bars.TextColumn("left"), bars.TimeRemainingColumn(),
        )  # fmt: skip
        self._bars = bars.Progress(*columns, console=self._rich, auto_refresh=False)
        self._live: Any = None
        self._stage_task: Any = None
        self._now: dict[str, float] = {}
        self._before: dict[str, float] = {}
        self._drawn = 0.0

    def stage(self, name: str, total_steps: int | None) -> None:
        self.close()
        self._total = total_steps
        self._now, self._before = {}, {}
        self._stage_task = self._bars.add_task(name, total=total_steps)
        self._live = extra("rich.live").Live(
            self._view(), console=self._rich, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        self._live.start()

    @contextmanager
    def phase(self, name: str, total: float | None = None) -> Iterator[Phase]:
        task = self._bars.add_task(f"  {name}", total=total)
        self._draw()
        try:
            yield _LivePhase(self, task)
        finally:
            self._bars.remove_task(task)
            self._draw()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._before, self._now = self._now, choose(metrics, self._chosen, TABLE_METRICS)
        if self._stage_task is not None:
            self._bars.update(self._stage_task, completed=step)
        self._draw(force=self._total is not None and step >= self._total)

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        panel, text = extra("rich.panel").Panel, extra("rich.text").Text
        for row in rows[:SAMPLES]:
            prompt, completion = (_cut(str(row.get(k, ""))) for k in ("prompt", "completion"))
            body = text.assemble((prompt, "dim"), "\n", (completion, "bold"))
            self._rich.print(panel(body, title=text(caption(row)), title_align="left", border_style="blue"))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        text = extra("rich.text").Text
        table = extra("rich.table").Table()
        for i, column in enumerate(columns):
            table.add_column(text(str(column)), justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*(text(cell(c)) for c in row))
        self._rich.print(text(title, "bold"))
        self._rich.print(table)

    def message(self, text: str) -> None:
        self._rich.print(text, markup=False, highlight=False)

    def close(self) -> None:
        if self._live is not None:
            self._draw(force=True)
            self._live.stop()
            self._live = None
        for task in list(self._bars.task_ids):
            self._bars.remove_task(task)
        self._stage_task = None

    def advance(self, task: Any, n: float) -> None:
        self._bars.advance(task, n)
        self._draw()

    def _draw(self, force: bool = False) -> None:
        now = time.monotonic()
        if self._live is not None and (force or now - self._drawn >= INTERVAL):
            self._drawn = now
            self._live.update(self._view(), refresh=True)

    def _view(self) -> Any:
        group, text = extra("rich.console").Group, extra("rich.text").Text
        table = extra("rich.table").Table(box=None, pad_edge=False)
        if not self._now:
            return group(self._bars)
        for name, justify in (("metric", "left"), ("now", "right"), ("", "center"), ("before", "right")):
            table.add_column(name, justify=justify, header_style="dim")
        for name, x in self._now.items():
            before = self._before.get(name)
            arrow = "" if before is None or x == before else "↑" if x > before else "↓"
            earlier = "" if before is None else number(before)
            table.add_row(text(name), text(number(x), "bold"), arrow, text(earlier, "dim"))
        return group(self._bars, table)


class _LivePhase:
    def __init__(self, owner: LiveConsole, task: Any) -> None:
        self._owner = owner
        self._task = task

    def advance(self, n: float = 1) -> None:
        self._owner.advance(self._task, n)


def _cut(text: str) -> str:
    return text if len(text) <= SAMPLE_TEXT else text[: SAMPLE_TEXT - 1] + "…"
