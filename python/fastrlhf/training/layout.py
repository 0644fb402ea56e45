"""How a run is spread over processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..config import option
from ..errors import ConfigError
from ..models import read_config
from ..parallel import ParallelGroups, Stages
from ..parallel.pipeline import connect


@dataclass
class ParallelConfig:
    """How models and data are spread over the processes that torchrun or SLURM started; dp is what tp and pp leave."""

    tp: int = option(1, "Tensor parallelism: processes that share every layer.", low=1)
    pp: int = option(1, "Pipeline parallelism: stages of layers.", low=1)
    dp: int | None = option(None, "Data parallelism; null is what is left of the processes, a number is checked.", low=1)
    interleave: int = option(1, "Chunks of layers a pipeline process has; more leave it idle for less and send more.", low=1)
    split: list[int] | None = option(None, "Layers of each of the pp x interleave stages; null cuts evenly.", low=1)
    sequence_parallel: bool = option(True, "With tp: share the rows between the blocks too. Changes no result.")
    reshard: bool = option(
        True, "With pp: each process takes the other stages' layers while it generates, for pp times as many replicas; false "
        "generates through the stages, which takes no more memory and is slower. On CPUs, as tested, changes no completion.",
    )  # fmt: skip
    balance: bool = option(
        True, "Replicas take sequences from one queue, the long ones first. On CPUs, as tested, changes no completion. False "
        "gives each as many prompts beforehand, so that no batch depends on timing: on GPUs the deterministic mode.",
    )  # fmt: skip
    timeout: float = option(1800.0, "Seconds that an exchange between processes may take before the run stops.", above=0)
    silence: float = option(60.0, "Seconds without a sign of life after which a process counts as dead.", above=0)


@dataclass(frozen=True)
class Layout:
    """The groups of this process and how models are cut over them."""

    groups: ParallelGroups = field(default_factory=ParallelGroups)
    config: ParallelConfig = field(default_factory=ParallelConfig)

    @staticmethod
    def create(config: ParallelConfig) -> Layout:
        """Collective over all processes.

        Raises:
            ConfigError: sizes that do not fit the number of processes.
        """
        try:
            groups = ParallelGroups.create(config.tp, config.pp, config.dp, timeout=config.timeout)
        except ValueError as error:
            raise ConfigError(f"parallel.{error}") from None
        connect(groups, config.interleave)
        return Layout(groups, config)

    def of(self, path: str) -> dict[str, Any]:
        """What a loader of the model in a directory needs to know."""
        if self.groups.world.size == 1:
            return {}
        config = self.config
        try:
            stages = Stages(
                read_config(path).num_hidden_layers, config.pp, config.interleave,
                None if config.split is None else tuple(config.split),
            )  # fmt: skip
        except ValueError as error:
            raise ConfigError(f"parallel: {path}: {error}") from None
        return {"groups": self.groups, "stages": stages, "sequence_parallel": config.sequence_parallel}
