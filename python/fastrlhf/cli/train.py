"""`fastrlhf train {sft,reward,ppo,grpo,rloo} --config file.yaml --any.key value`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..config import ConfigError, describe, load
from ..training.loop import COLUMNS, Result, fit, prepare
from ..training.progress import Progress
from .arguments import user_errors
from .console import Console


class Recipe(NamedTuple):
    """An algorithm's module under fastrlhf.algorithms, its configuration and its class."""

    module: str
    config: str
    algorithm: str
    help: str


RECIPES = {
    "sft": Recipe("sft", "SFTConfig", "SFT", "supervised fine-tuning on conversations"),
    "reward": Recipe("reward", "RewardConfig", "RewardTraining", "a reward model from preference pairs"),
    "ppo": Recipe("ppo", "PPOConfig", "PPO", "proximal policy optimization with a critic"),
    "grpo": Recipe("grpo", "GRPOConfig", "GroupRelative", "group-relative policy optimization"),
    "rloo": Recipe("rloo", "RLOOConfig", "RLOO", "REINFORCE leave-one-out"),
}


def main(argv: Sequence[str]) -> int:
    words = list(argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    name = words.pop(0)
    if any(w in ("-h", "--help") for w in words):
        config, _ = classes(name)
        print(f"usage: fastrlhf train {name} [--config FILE.yaml] [--KEY VALUE ...]\n\n{describe(config)}")
        return 0
    console = Console()
    try:
        result = train(name, *arguments(words), progress=console)
        show(console, name, result)
    finally:
        console.close()
    return 0


def usage() -> str:
    width = max(map(len, RECIPES))
    lines = [f"  {name.ljust(width)}  {recipe.help}" for name, recipe in RECIPES.items()]
    return "\n".join([
        "usage: fastrlhf train ALGORITHM [--config FILE.yaml] [--KEY VALUE ...]", "", "algorithms:", *lines, "",
        "fastrlhf train ALGORITHM --help lists every key; --resume auto goes on with a run that was stopped.",
    ])  # fmt: skip


def classes(name: str) -> tuple[type[Any], type[Any]]:
    """The configuration and the algorithm of a name."""
    if name not in RECIPES:
        raise ConfigError(f"train: expected one of {', '.join(RECIPES)}, got {name!r}")
    recipe = RECIPES[name]
    module = importlib.import_module(f"..algorithms.{recipe.module}", __package__)
    return getattr(module, recipe.config), getattr(module, recipe.algorithm)


def arguments(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """(--config's file, the overrides); --resume is short for --run.resume."""
    file, rest = None, []
    i = 0
    while i < len(words):
        key, equals, value = words[i].partition("=")
        if key == "--config":
            if not equals:
                i += 1
                if i == len(words):
                    raise ConfigError("--config: expected a file after it")
                value = words[i]
            file = Path(value)
        else:
            rest.append(f"--run.resume{equals}{value}" if key == "--resume" else words[i])
        i += 1
    return file, rest


def train(name: str, file: Path | None, overrides: Sequence[str], *, progress: Progress) -> Result:
    """Run an algorithm as configured."""
    config_class, algorithm = classes(name)
    config = load(config_class, file, overrides)
    prepare(config.run)
    with user_errors():
        return fit(algorithm(config), config.run, config, progress)


def show(progress: Progress, name: str, result: Result) -> None:
    """The table of before and after, and where the report is."""
    if rows := result.table():
        progress.table(f"{name}: held-out", COLUMNS, rows)
    progress.message(f"report: {result.directory / 'report.html'}")
