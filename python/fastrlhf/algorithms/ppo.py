"""Proximal policy optimization with a critic (Schulman et al. 2017; Ziegler et al. 2019; Ouyang et al. 2022).

prompts -> completions -> rewards -> log-probs of policy and reference, values -> `experience` -> minibatches of
`policy_loss` and `value_loss`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import option, section
from ..errors import ConfigError
from ..ops import experience
from ..training.critic import Critic, CriticConfig, explained_variance
from ..training.metrics import Value
from ..training.on_policy import OnPolicy, OnPolicyConfig
from ..training.progress import Progress
from ..training.rollout import Rollout


@dataclass
class PPOConfig(OnPolicyConfig):
    """Proximal policy optimization with a critic."""

    gamma: float = option(1.0, "Discount of later rewards.", low=0, high=1)
    lam: float = option(0.95, "λ of the generalized advantage estimate.", low=0, high=1)
    whiten: bool = option(True, "Whiten advantages over the whole rollout.")
    score_clip: float | None = option(None, "Clips scores to ± this; null does not.", low=0)
    critic: CriticConfig = section(CriticConfig, "The critic.")


class PPO(OnPolicy):
    name = "ppo"
    config: PPOConfig

    def __init__(self, config: PPOConfig) -> None:
        super().__init__(config)
        if config.critic.warmup_steps >= config.steps:
            raise ConfigError(
                f"critic.warmup_steps: expected fewer than the {config.steps} steps, got {config.critic.warmup_steps}"
            )
        model = self.policy.model
        self.critic = Critic(
            config.critic, config.model.path, seed=config.run.seed, total_steps=config.steps, rollout_size=self.rollout_size,
            vocab_size=model.config.vocab_size, device=self.policy.device, dtype=model.dtype, parallel=self.parallel,
        )  # fmt: skip

    @property
    def needs_logprobs(self) -> bool:
        return True

    def learn(self, rollout: Rollout, step: int, progress: Progress) -> dict[str, Value]:
        config = self.config
        tokens = sum(map(len, rollout.sequences.tokens))
        with self.timers("values", tokens), progress.phase("values"):
            rollout.values = self.critic.values(rollout.sequences)
        assert rollout.logprobs is not None
        reference = rollout.logprobs if rollout.ref_logprobs is None else rollout.ref_logprobs
        in_reward = config.kl.where == "reward"
        with self.timers("experience"):
            found = experience(
                rollout.scores, rollout.logprobs, reference, rollout.values, None,
                kl_coef=self.kl.coef if in_reward else 0.0, kl=config.kl.kind, score_clip=config.score_clip,
                gamma=config.gamma, lam=config.lam, whiten=config.whiten, cu_seqlens=rollout.cu_seqlens,
            )  # fmt: skip
        metrics: dict[str, Value] = {"score": float(rollout.scores.mean())}
        if config.kl.coef > 0:
            kl = rollout.logprobs - reference
            metrics |= {"kl": float(kl.mean())} | self.adapt_kl(float(kl.sum()) / len(rollout))
        metrics |= {
            "returns": float(found.returns.mean()),
            "explained_variance": explained_variance(rollout.values, found.returns),
        }
        if step > config.critic.warmup_steps:
            metrics |= self.update_policy(rollout, found.advantages, step, progress)
        with self.timers("critic", tokens * config.critic.epochs), progress.phase("critic"):
            self.policy.touched = True
            stats = self.critic.update(rollout, found.returns, step=step)
        return metrics | {f"critic/{name}": value for name, value in stats.items()}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return super().tensors() | self.critic.tensors()

    def state(self) -> dict[str, Any]:
        return super().state() | {"critic": self.critic.state()}

    def prepare(self, state: Mapping[str, Any]) -> None:
        super().prepare(state)
        self.critic.optimizer.prepare(state["critic"])

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        super().restore(tensors, state)
        self.critic.restore(dict(tensors), state["critic"])  # type: ignore[arg-type]

    def export(self, directory: Path) -> None:
        super().export(directory)
        self.critic.save(directory / "critic", self.tokenizer)
