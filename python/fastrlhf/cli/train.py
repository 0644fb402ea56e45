"""`fastrlhf train {sft,reward,ppo,grpo,rloo} --config file.yaml --any.key value`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..config import ConfigError
from ..training.loop import COLUMNS, Result, fit, prepare
from ..training.progress import Progress
from .arguments import arguments, user_errors
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
    config = configure(name, words)
    if config is None:
        return 0
    console = Console()
    try:
        show(console, name, train(name, config, progress=console))
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


def configure(name: str, words: Sequence[str]) -> Any:
    """The configuration that a command line gives an algorithm; --resume is short for --run.resume. None where it asked
    for --help, which is printed."""
    config, _ = classes(name)
    long = [f"--run.{word[2:]}" if word.partition("=")[0] == "--resume" else word for word in words]
    return arguments(f"train {name}", config, long)


def train(name: str, config: Any, *, progress: Progress) -> Result:
    """Run an algorithm as configured."""
    prepare(config.run)
    with user_errors():
        algorithm = classes(name)[1](config)
        try:
            return fit(algorithm, config.run, config, progress)
        finally:
            if close := getattr(algorithm, "close", None):
                close()


def show(progress: Progress, name: str, result: Result) -> None:
    """The table of before and after, and where the report is."""
    if rows := result.table():
        progress.table(f"{name}: held-out", COLUMNS, rows)
    progress.message(f"report: {result.directory / 'report.html'}")
