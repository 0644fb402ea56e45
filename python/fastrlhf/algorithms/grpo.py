"""Group-relative policy optimization (Shao et al. 2024) and its relatives: advantages within the completions of a prompt,
no critic."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config import option, section
from ..errors import ConfigError
from ..ops import group_advantages, kl
from ..training.metrics import Value
from ..training.on_policy import KLConfig, OnPolicy, OnPolicyConfig
from ..training.progress import Progress
from ..training.rollout import Rollout


@dataclass
class GRPOConfig(OnPolicyConfig):
    """Group-relative policy optimization."""

    completions_per_prompt: int = option(8, "Completions of each prompt, its group.", low=1)
    kl: KLConfig = section(KLConfig, "The pull towards the reference.", coef=0.04, where="loss", kind="k3")
    advantage: str = option("grpo", "How scores become advantages.", choices=("grpo", "dr_grpo", "rloo", "reinforce++", "opo"))


class GroupRelative(OnPolicy):
    """Advantages from `group_advantages`; with kl.where = reward, a completion's KL is taken off its score first."""

    name = "grpo"
    config: GRPOConfig

    def __init__(self, config: GRPOConfig) -> None:
        if config.completions_per_prompt < 2 and config.advantage != "reinforce++":
            raise ConfigError(f"completions_per_prompt: {config.advantage} compares completions, expected 2 or more, got 1")
        super().__init__(config)

    def learn(self, rollout: Rollout, step: int, progress: Progress) -> dict[str, Value]:
        config = self.config
        scores, lengths = rollout.scores, torch.tensor(rollout.sequences.completion_lengths, device=rollout.scores.device)
        metrics: dict[str, Value] = {}
        if rollout.ref_logprobs is not None:
            policy = rollout.rollout_logprobs if rollout.logprobs is None else rollout.logprobs
            metrics |= {"kl": float((policy - rollout.ref_logprobs).mean())}
            estimate = kl(policy, rollout.ref_logprobs, kind=config.kl.kind)
            of_completion = torch.segment_reduce(estimate, "sum", lengths=lengths)
            if config.kl.where == "reward":
                scores = scores - self.kl.coef * of_completion
            metrics |= self.adapt_kl(float(of_completion.mean()))
        with self.timers("advantages"):
            advantages = group_advantages(scores, rollout.group_ids, kind=config.advantage, lengths=lengths)
        alike = scores.view(-1, config.completions_per_prompt)
        metrics |= {"score": float(scores.mean()), "groups_alike": float((alike == alike[:, :1]).all(1).float().mean())}
        return metrics | self.update_policy(rollout, advantages, step, progress)
