"""The loop of every algorithm: steps, metrics, evaluation, checkpoints, resuming, and stopping in time."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config import REQUIRED, option, to_dict, to_yaml
from ..errors import CheckpointError, ConfigError, UserError
from ..parallel.watch import Watch
from .checkpoint import Checkpoints, restore_rng, rng_tensors
from .memory import PeakMemory, keep_freed_memory
from .metrics import METRICS, SAMPLES, TABLES, Metrics, Unwritten, Value, read_lines
from .optim import NotFinite
from .progress import Progress, Silent
from .report import write_report
from .timers import Timers
from .together import LostRun, Together

COLUMNS = ("held-out metric", "before", "after", "after / before")
CHECKPOINTS, FINAL, CONFIG = "checkpoints", "final", "config.yaml"


@dataclass
class RunConfig:
    """Where a run lives and how it is kept."""

    directory: str = option(REQUIRED, "Of the run: config, metrics, samples, checkpoints, report, and final/, the model.")
    seed: int = option(0, "Of everything that is drawn.")
    resume: str = option(
        "never",
        "auto goes on from the last checkpoint, if there is one; never refuses a directory that holds a run; or a checkpoint.",
    )
    overwrite: bool = option(False, "With resume never: remove a run that is in the directory.")
    save_every: int = option(50, "Steps between checkpoints; 0 saves at the end only.", low=0)
    keep: int = option(2, "How many checkpoints to keep.", low=1)
    eval_every: int = option(0, "Steps between evaluations; 0 evaluates before and after only.", low=0)
    time_limit: float | None = option(
        None, "Seconds after which the run saves and stops, the last step and the saving counted.", low=0
    )
    threads: int | None = option(None, "CPU threads; null is torch's choice.", low=1)
    tensorboard: bool = option(True, "Write TensorBoard events.")
    wandb: str | None = option(None, "Weights & Biases project to log to.")
    report: bool = option(True, "Draw report.html and report.png at the end; `fastrlhf report` draws them later.")
    export: bool = option(True, "Write final/, a Hugging Face directory, at the end.")


class Algorithm(Protocol):
    """What differs between SFT, reward training, PPO and its relatives."""

    name: str
    steps: int
    timers: Timers

    def step(self, step: int, progress: Progress) -> Mapping[str, Value]:
        """One step, counted from 1; metrics. Until it first changes a weight, `state()` of before describes it."""

    def evaluate(self, progress: Progress) -> Mapping[str, Value]:
        """Held-out metrics; empty where there is nothing to evaluate on."""

    def samples(self) -> list[dict[str, Any]]:
        """A few completions of the last step or evaluation."""

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Everything that a resumed run needs, in named groups."""

    def state(self) -> dict[str, Any]:
        """The same, of what JSON holds."""

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Make every tensor that `tensors` named when the state was this one, for its checkpoint to be read into."""

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None: ...

    def export(self, directory: Path) -> None:
        """The trained model as a Hugging Face directory."""

    @property
    def touched(self) -> bool:
        """Whether the step under way has changed a weight."""


@dataclass(frozen=True)
class Result:
    """`before` and `after` are the first and last evaluation's metrics, `samples` completions of the last; `finished` is
    false where time ran out."""

    directory: Path
    steps: int
    finished: bool
    before: dict[str, float]
    after: dict[str, float]
    samples: list[dict[str, Any]]
    report: Path | None = None  # where it was drawn

    def table(self) -> list[list[Any]]:
        """A row for each held-out metric, of `COLUMNS`."""
        names = [n for n in self.after if n in self.before]
        return [[n, self.before[n], self.after[n], _times(self.before[n], self.after[n])] for n in names]


def prepare(run: RunConfig) -> None:
    """Threads, memory, and the directory: what is there is refused, removed, or to be resumed.

    Raises:
        ConfigError: a run is there and `resume` is never.
    """
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    keep_freed_memory()
    Together().lead(lambda: _make_room(run))


def _make_room(run: RunConfig) -> None:
    directory = Path(run.directory)
    if run.resume != "never" or not (directory / METRICS).exists():
        return
    if not run.overwrite:
        raise ConfigError(
            f"run.directory: {directory} already holds a run; --run.resume auto goes on with it, --run.overwrite true "
            "removes it"
        )
    for name in (METRICS, SAMPLES, TABLES, "report.html", "report.png", CONFIG):
        (directory / name).unlink(missing_ok=True)
    for name in (CHECKPOINTS, FINAL, "tensorboard"):
        shutil.rmtree(directory / name, ignore_errors=True)


def fit(
    algorithm: Algorithm, run: RunConfig, config: Any, progress: Progress | None = None, watch: Watch | None = None
) -> Result:
    """Run an algorithm to its last step, from a checkpoint if `run.resume` says so. Collective over all processes of a run; the
    first one writes.

    Args:
        watch: of this process, where there are several.

    Raises:
        UserError: what went wrong and in which step. What was computed before it is saved: where the step had not yet
            changed a weight, as a checkpoint of the steps before it (of one process). Where another process is gone, which.
    """
    started = time.monotonic()
    together = Together(watch)
    progress = progress if progress is not None and together.leader else Silent()
    directory = Path(run.directory)
    directory.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(directory / CHECKPOINTS, keep=run.keep)
    done = _resume(algorithm, run, checkpoints, progress, together)
    metrics: Metrics | Unwritten = Unwritten()
    if together.leader:
        metrics = Metrics(directory, tensorboard=run.tensorboard, wandb=run.wandb, config=to_dict(config))
        (directory / CONFIG).write_text(to_yaml(config))
        metrics.truncate(done + 1 if done else 0)
    progress.stage(algorithm.name, algorithm.steps)
    saved = done if done else -1
    longest = 0.0

    def save(step: int, state: Mapping[str, Any], rng: Mapping[str, Tensor]) -> None:
        nonlocal saved
        with progress.phase("save"):
            together.save(checkpoints, step, algorithm, {"step": step, "algorithm": state}, rng)
        saved = step

    def evaluate(step: int) -> None:
        found = algorithm.evaluate(progress)
        if found:
            numbers = metrics.log(step, found, phase="eval")
            metrics.samples(step, algorithm.samples())
            progress.message(f"eval at step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in numbers.items()))
            progress.samples(algorithm.samples())

    try:
        if not done:
            evaluate(0)
        algorithm.timers.pop()
        memory = PeakMemory()
        with _interrupts() as interrupted:
            while done < algorithm.steps:
                begun = time.monotonic()
                before, rng = algorithm.state(), rng_tensors()
                try:
                    values = dict(algorithm.step(done + 1, progress))
                except (UserError, ValueError, RuntimeError, KeyboardInterrupt) as error:
                    alone = together.world == 1  # several may not be at the same place
                    raise _stopped(
                        together.reason(error), done, save if alone and not algorithm.touched else None, before, rng, saved,
                        checkpoints if together.leader else None,
                    ) from error  # fmt: skip
                done += 1
                numbers = metrics.log(done, values | algorithm.timers.pop() | memory.pop())
                progress.step(done, numbers)
                if rows := algorithm.samples():
                    metrics.samples(done, rows)
                    progress.samples(rows)
                last = done == algorithm.steps
                if last or (run.eval_every and done % run.eval_every == 0):
                    evaluate(done)
                    algorithm.timers.pop()
                longest = max(longest, time.monotonic() - begun)
                late = run.time_limit is not None and time.monotonic() - started + 1.5 * longest > run.time_limit
                out_of_time, asked = together.any(late), together.any(interrupted())
                if last or out_of_time or asked or (run.save_every and done % run.save_every == 0):
                    save(done, algorithm.state(), rng_tensors())
                if not last and (out_of_time or asked):
                    why = "the time limit is near" if out_of_time else "asked to stop"
                    progress.message(f"{why}: saved step {done} of {algorithm.steps}; --run.resume auto goes on")
                    break
        finished = done >= algorithm.steps
        if finished and run.export:
            with progress.phase("export"):
                _export(algorithm, directory / FINAL, together)
    finally:
        metrics.close()
    if not together.leader:
        return Result(directory, done, finished, {}, {}, [])
    evals = [line for line in read_lines(directory / METRICS) if line.get("phase") == "eval"]
    first, final = (_numbers(evals[0]), _numbers(evals[-1])) if evals else ({}, {})
    rows = read_lines(directory / SAMPLES)
    samples = [r for r in rows if r["step"] == rows[-1]["step"]][-5:] if rows else []
    result = Result(directory, done, finished, first, final, samples)
    if final:
        metrics.table(f"{algorithm.name}: held-out", COLUMNS, result.table())
    return replace(result, report=write_report(directory)) if run.report else result


def _resume(algorithm: Algorithm, run: RunConfig, checkpoints: Checkpoints, progress: Progress, together: Together) -> int:
    if run.resume == "never":
        return 0
    path = together.latest(checkpoints) if run.resume == "auto" else Path(run.resume)
    if path is None:
        return 0
    rng, state = together.load(checkpoints, path, algorithm)
    restore_rng(rng)
    progress.message(f"resumed from {path}")
    return int(state["step"])


def _stopped(
    error: BaseException, done: int, save: Any, state: Mapping[str, Any], rng: Mapping[str, Tensor], saved: int,
    checkpoints: Checkpoints | None,
) -> BaseException:  # fmt: skip
    """What to raise when step done + 1 failed: the error with its step, and, of the process that writes checkpoints and so need
    not read them through, what remains on disk."""
    if save is not None and saved != done:
        save(done, state, rng)
    if isinstance(error, KeyboardInterrupt):
        return error
    if not isinstance(error, UserError | ValueError):  # not the user's: its own type and traceback say more
        return error
    kept = ""
    if checkpoints is not None:
        latest = checkpoints.latest()
        kept = f"; the last checkpoint is {latest}" if latest else "; there is no checkpoint yet"
    kind = type(error) if type(error) in (NotFinite, CheckpointError, ConfigError, LostRun) else UserError
    return kind(f"step {done + 1}: {error}{kept}")


def _export(algorithm: Algorithm, final: Path, together: Together) -> None:
    aside = final.with_name(final.name + ".tmp")
    if together.leader:
        shutil.rmtree(aside, ignore_errors=True)
    algorithm.export(aside)
    if together.leader:
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)


def _times(before: float, after: float) -> str:
    return f"{after / before:.2f}x" if before > 0 and after >= 0 else ""


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in line.items() if k not in ("step", "time") and isinstance(v, int | float)}


@contextmanager
def _interrupts() -> Iterator[Any]:
    """Within: SIGTERM asks the loop to stop after its step, instead of ending the process."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
