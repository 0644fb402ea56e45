"""What a run measures, written as it happens: metrics.jsonl, samples.jsonl, tables.json, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import math
import os
import time
import uuid
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import extra
from ..ops.stats import LossStats

METRICS, SAMPLES, TABLES = "metrics.jsonl", "samples.jsonl", "tables.json"
Value = float | int | Tensor | LossStats


class Metrics:
    """The record of one run. Every line is on disk when the call returns.

    Args:
        directory: of the run; files that are there are continued.
        tensorboard: also write TensorBoard events, into `tensorboard/`.
        wandb: also log to this Weights & Biases project; the run's id is kept in the directory for the next start.
        config: what Weights & Biases shows as the run's configuration.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        tensorboard: bool = True,
        wandb: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, IO[str]] = {}
        self._tensorboard = extra("torch.utils.tensorboard").SummaryWriter if tensorboard else None
        self._writer: Any = None
        self._purge: int | None = None
        self._wandb = None if wandb is None else _start_wandb(self.directory, wandb, config)
        self._warned: set[str] = set()
        for name in (METRICS, SAMPLES):
            _drop(self.directory / name, math.inf)

    def log(self, step: int, values: Mapping[str, Value], phase: str | None = None) -> dict[str, float]:
        """Writes one line: step, phase, unix time, then the metrics by name.

        Args:
            values: Python numbers, tensors of one element, and `LossStats`, whose names follow theirs and a slash. Those
                on a device are read in one transfer.
            phase: written with the line, and before the names in TensorBoard and Weights & Biases; None for training.

        Returns:
            The metrics as Python floats. What is not finite is null in the line, with its name under "not_finite", and
            warned of once.
        """
        numbers = to_floats(values)
        wrong = {name: str(x) for name, x in numbers.items() if not math.isfinite(x)}
        for name in wrong.keys() - self._warned:
            warnings.warn(f"step {step}: metric {name} is {wrong[name]}", stacklevel=2)
        self._warned |= wrong.keys()
        line: dict[str, Any] = {"step": step} | ({} if phase is None else {"phase": phase}) | {"time": round(time.time(), 3)}
        line |= {name: None if name in wrong else x for name, x in numbers.items()}
        self._append(METRICS, line | ({"not_finite": wrong} if wrong else {}))
        prefix = "" if phase is None else f"{phase}/"
        if self._tensorboard is not None:
            if self._writer is None:
                self._writer = self._tensorboard(str(self.directory / "tensorboard"), purge_step=self._purge)
            for name, x in numbers.items():
                self._writer.add_scalar(prefix + name, x, step)
        if self._wandb is not None:
            self._wandb.log({prefix + name: x for name, x in numbers.items()} | {"step": step})
        return numbers

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes one line for each row, with the step: prompt, completion, reward and what else there is."""
        for row in rows:
            plain = {k: to_floats({k: v})[k] if isinstance(v, (Tensor, float)) else v for k, v in row.items()}
            finite = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()}
            self._append(SAMPLES, {"step": step} | finite)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Keeps a table, as the one of before and after, for the report; one of the same title is replaced."""
        path = self.directory / TABLES
        tables = [t for t in read_tables(self.directory) if t["title"] != title]
        tables.append({"title": title, "columns": list(columns), "rows": [list(row) for row in rows]})
        _replace(path, json.dumps(tables, indent=1, ensure_ascii=False))

    def truncate(self, step: int) -> None:
        """Forgets everything of steps >= `step`, from which the run goes on: the files become those of a run that was
        never stopped."""
        self._close_files()
        for name in (METRICS, SAMPLES):
            _drop(self.directory / name, step)
        self._purge = step
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def flush(self) -> None:
        """Makes TensorBoard's events visible now instead of within two minutes."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        self._close_files()
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        if name not in self._files:
            self._files[name] = (self.directory / name).open("a", encoding="utf-8")
        self._files[name].write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self._files[name].flush()

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


class Unwritten:
    """The `Metrics` of a process that is not the first of its run: the same calls, nothing on disk."""

    def log(self, step: int, values: Mapping[str, Value], phase: str | None = None) -> dict[str, float]:
        return to_floats(values)

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        pass

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        pass

    def close(self) -> None:
        pass


def to_floats(values: Mapping[str, Value]) -> dict[str, float]:
    """Metrics as Python floats, in order, with one transfer for each device and not one for each metric."""
    tensors: dict[torch.device, list[Tensor]] = {}
    for name, value in values.items():
        tensor = value.values if isinstance(value, LossStats) else value
        if isinstance(tensor, Tensor):
            if not isinstance(value, LossStats) and tensor.numel() != 1:
                raise ValueError(f"{name}: expected a tensor of one element, got shape {tuple(tensor.shape)}")
            tensors.setdefault(tensor.device, []).append(tensor.detach().reshape(-1).double())
        elif isinstance(tensor, str) or not hasattr(tensor, "__float__"):
            raise TypeError(f"{name}: expected a number, a tensor of one element or LossStats, got {type(value).__name__}")
    read = {device: iter(torch.cat(parts).tolist()) for device, parts in tensors.items()}
    numbers: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, LossStats):
            numbers |= {f"{name}/{part}": next(read[value.values.device]) for part in value.names}
        elif isinstance(value, Tensor):
            numbers[name] = next(read[value.device])
        else:
            numbers[name] = float(value)
    return numbers


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file, without a last one that a kill cut short; none where there is no file."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            value = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            value = None
        if isinstance(value, dict):
            lines.append(value)
    return lines


def read_tables(directory: Path) -> list[dict[str, Any]]:
    """What `Metrics.table` kept."""
    path = directory / TABLES
    return list(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else []


def _drop(path: Path, step: float) -> None:
    """Rewrites a JSONL file without the lines of steps >= `step` and without one cut short; leaves a sound file alone."""
    if not path.exists():
        return
    kept = []
    lines = path.read_bytes().splitlines(keepends=True)
    for line in lines:
        try:
            if line.endswith(b"\n") and json.loads(line)["step"] < step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    if len(kept) < len(lines):
        _replace(path, b"".join(kept).decode())


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def _start_wandb(directory: Path, project: str, config: Mapping[str, Any] | None) -> Any:
    wandb = extra("wandb", "wandb")
    file = directory / "wandb-id"
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:12])
    run = wandb.init(
        project=project, id=file.read_text(), resume="allow", name=directory.name, dir=str(directory), config=dict(config or {})
    )
    run.define_metric("*", step_metric="step")  # W&B's own step cannot go back to where a run resumes
    return run
