"""`fastrlhf train {sft,reward,dpo,ppo,grpo,rloo} --config file.yaml --any.key value`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch.distributed as dist

from ..config import ConfigError
from ..parallel.groups import coordinates
from ..parallel.launch import rank, start
from ..parallel.watch import Watch
from ..training.layout import ParallelConfig
from ..training.loop import COLUMNS, Result, fit, prepare
from ..training.progress import Progress, Silent
from ..training.together import Together
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
    "dpo": Recipe("dpo", "DPOConfig", "DPO", "direct preference optimization, and other losses on preference pairs"),
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
    console = Console() if rank() == 0 else Silent()
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
    """Run an algorithm as configured, together with the other processes that torchrun or SLURM started."""
    with joined(config.parallel) as watch:
        prepare(config.run)
        with user_errors():
            algorithm = classes(name)[1](config)
            if watch is not None:
                progress.message(algorithm.groups.picture())
            try:
                return fit(algorithm, config.run, config, progress, watch)
            finally:
                if close := getattr(algorithm, "close", None):
                    close()


@contextmanager
def joined(config: ParallelConfig) -> Iterator[Watch | None]:
    """Within: this process is one of the run's, and watched by the others where there are others."""
    start(config.timeout)
    if not dist.is_initialized():
        yield None
        return
    world = dist.get_world_size()
    dp = max(world // (config.tp * config.pp), 1)
    store = dist.distributed_c10d._get_default_store()
    watch = Watch(
        store, dist.get_rank(), world, timeout=config.silence, place=lambda r: coordinates(r, config.tp, config.pp, dp)
    )
    try:
        yield watch
        dist.barrier()
    except BaseException as error:
        found = Together(watch).reason(error)
        if found is error:
            raise
        raise found from error
    watch.close()
    dist.destroy_process_group()


def show(progress: Progress, name: str, result: Result) -> None:
    """The table of before and after, and where the report is."""
    if rows := result.table():
        progress.table(f"{name}: held-out", COLUMNS, rows)
    if result.report is not None:
        progress.message(f"report: {result.report}")
