"""REINFORCE leave-one-out (Ahmadian et al. 2024): a completion against the mean of its prompt's others, the KL in the
reward."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import option, section
from ..training.on_policy import KLConfig
from .grpo import GroupRelative, GRPOConfig


@dataclass
class RLOOConfig(GRPOConfig):
    """REINFORCE leave-one-out."""

    completions_per_prompt: int = option(4, "Completions of each prompt.", low=1)
    kl: KLConfig = section(KLConfig, "The pull towards the reference.", coef=0.05, where="reward", kind="k1")
    advantage: str = option("rloo", "How scores become advantages.", choices=("grpo", "dr_grpo", "rloo", "reinforce++", "opo"))


class RLOO(GroupRelative):
    name = "rloo"
