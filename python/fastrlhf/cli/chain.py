"""`fastrlhf chain FILE.yaml`: several commands one after another, as SFT, reward model and PPO, from one file."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..errors import UserError, extra
from ..parallel.launch import processes
from ..training.loop import COLUMNS, Result
from ..training.report import write_report
from .console import Console
from .main import COMMANDS, dispatch
from .train import configure, train

USAGE = """usage: fastrlhf chain FILE.yaml [--NAME VALUE ...]

Runs the stages of a file, in order, in one process:

  variables: {directory: build/run, seed: 0}     every {name} in a stage is replaced; --name value overrides
  stages:
    - {name: data, shell: "python make_data.py --output {directory}/data"}
    - {name: model, fastrlhf: init, options: {output: "{directory}/model", data: "{directory}/data/sft.jsonl"}}
    - {name: sft, fastrlhf: train sft, config: sft.yaml, options: {run.directory: "{directory}/sft"}}

config is relative to the file, {here} is its folder. A stage whose `creates` exists already is passed over; a training
stage goes on where it was stopped."""


@dataclass(frozen=True)
class Stage:
    name: str
    command: list[str]  # of fastrlhf, or of a shell
    shell: bool
    creates: str | None


def main(argv: Sequence[str]) -> int:
    words = list(argv)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if processes() > 1:
        raise ConfigError(f"chain: runs in one process, this run has {processes()}; give its training commands one by one")
    file = Path(words.pop(0))
    variables, stages = read(file, words)
    started = time.monotonic()
    console = Console()
    results: dict[str, Result] = {}
    try:
        for stage in stages:
            if stage.creates is not None and Path(stage.creates).exists():
                console.message(f"== {stage.name}: {stage.creates} is there already")
                continue
            begun = time.monotonic()
            result = run(stage, console)
            if result is not None:
                results[stage.name] = result
                if not result.finished:
                    console.message(f"{stage.name} was stopped; the same command goes on with it")
                    return 0
            console.message(f"{stage.name} took {time.monotonic() - begun:.0f} s")
        for name, result in results.items():
            if rows := result.table():
                console.table(f"{name}: held-out", COLUMNS, rows)
            console.samples(result.samples)
        directory = Path(variables.get("directory", "."))
        if results:
            report = write_report(directory)
            console.message(f"plots: {report.with_suffix('.png')}, {report}")
        console.message(f"done in {time.monotonic() - started:.0f} s")
    finally:
        console.close()
    return 0


def read(file: Path, words: Sequence[str]) -> tuple[dict[str, str], list[Stage]]:
    """The variables and stages of a file.

    Raises:
        ConfigError: what is not as the usage says, with the file and stage.
    """
    try:
        tree = extra("yaml").safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(f"chain: {file}: {error.strerror}") from error
    except Exception as error:
        raise ConfigError(f"chain: {file} is no YAML: {error}") from error
    if not isinstance(tree, Mapping) or not isinstance(tree.get("stages"), list) or set(tree) - {"variables", "stages"}:
        raise ConfigError(
            f"chain: {file}: expected the keys variables and stages, got {list(tree) if isinstance(tree, Mapping) else tree}"
        )
    variables = {str(k): str(v) for k, v in (tree.get("variables") or {}).items()}
    variables |= _overrides(words, variables, file)
    variables["here"] = str(file.parent)
    variables["python"] = shlex.quote(sys.executable)
    return variables, [_stage(given, i, variables, file) for i, given in enumerate(tree["stages"])]


def _overrides(words: Sequence[str], known: Mapping[str, str], file: Path) -> dict[str, str]:
    out = {}
    rest = list(words)
    while rest:
        key, equals, value = rest.pop(0).partition("=")
        name = key.removeprefix("--").replace("-", "_")
        if not key.startswith("--") or name not in known:
            raise ConfigError(f"chain: {key}: {file} has no such variable; it has {', '.join(known) or 'none'}")
        if not equals:
            if not rest:
                raise ConfigError(f"chain: {key}: expected a value after it")
            value = rest.pop(0)
        out[name] = value
    return out


def _stage(given: Any, index: int, variables: Mapping[str, str], file: Path) -> Stage:
    where = f"chain: {file}: stages.{index}"
    if not isinstance(given, Mapping) or set(given) - {"name", "shell", "fastrlhf", "config", "options", "creates"}:
        raise ConfigError(f"{where}: expected name, shell or fastrlhf, config, options, creates; got {given}")
    if ("shell" in given) == ("fastrlhf" in given):
        raise ConfigError(f"{where}: expected either shell or fastrlhf")

    def fill(text: Any) -> str:
        try:
            return str(text).format_map(variables)
        except (KeyError, ValueError, IndexError) as error:
            raise ConfigError(f"{where}: {text!r}: no variable {error}; there are {', '.join(variables)}") from None

    name = fill(given.get("name", f"stage {index}"))
    creates = fill(given["creates"]) if "creates" in given else None
    if "shell" in given:
        return Stage(name, [fill(given["shell"])], True, creates)
    command = fill(given["fastrlhf"]).split()
    if command[0] not in COMMANDS:
        raise ConfigError(f"{where}.fastrlhf: expected one of {', '.join(COMMANDS)}, got {command[0]!r}")
    if "config" in given:
        command += ["--config", str(file.parent / fill(given["config"]))]
    for key, value in (given.get("options") or {}).items():
        command += [f"--{key}", fill(_yaml(value))]
    return Stage(name, command, False, creates)


def _yaml(value: Any) -> str:
    if isinstance(value, str):
        return value
    text = str(extra("yaml").safe_dump(value, default_flow_style=True, width=10**6))
    return text.removesuffix("...\n").strip()


def run(stage: Stage, console: Console) -> Result | None:
    """Run a stage; a training's result.

    Raises:
        UserError: it failed; with its name.
    """
    if stage.shell:
        console.message(f"== {stage.name}: {stage.command[0]}")
        status = subprocess.run(stage.command[0], shell=True, env=os.environ | {"PYTHON": sys.executable}).returncode
    elif stage.command[0] == "train":
        name, *words = stage.command[1:]
        return train(name, configure(name, ["--run.resume", "auto", *words]), progress=console)
    else:
        console.message(f"== {stage.name}: fastrlhf {stage.command[0]}")
        status = dispatch(stage.command[0], stage.command[1:])
    if status:
        raise UserError(f"{stage.name}: ended with status {status}")
    return None
