"""What PPO, GRPO and RLOO share: prompts, rollouts, evaluation, and the state of all that."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import REQUIRED, option, section
from ..data import PromptDataset, PromptStream, open_rows
from ..errors import ConfigError
from ..generation import Fleet, Resharded
from ..generation.select import GenerationConfig, make_engine
from ..ops import AdaptiveKL, FixedKL, logprob_drift
from ..seeds import mix
from .layout import Layout, ParallelConfig
from .loop import RunConfig
from .metrics import Value
from .policy import ModelConfig, Policy, UpdateConfig
from .progress import Progress
from .rewards import Rewards, RewardSource
from .rollout import Rollout, SamplingConfig, ScoreConfig, collect
from .timers import Timers

SAMPLES = 5


@dataclass
class PromptConfig:
    """Prompts: JSONL (.gz), Parquet, a saved Hugging Face dataset or hf:name."""

    path: str = option(REQUIRED, "File, several separated by commas, or dataset.")
    held_out: str | None = option(None, "The same, to evaluate on; null evaluates nothing.")
    held_out_limit: int | None = option(None, "Evaluate on the first so many.", low=1)
    prompt_field: str = option("prompt", "Field with the prompt, a string or messages.")
    template: str | None = option(None, 'Builds the prompt from a row\'s fields instead, as "Question: {question}\\nAnswer:".')
    max_prompt_tokens: int = option(512, "Longer prompts are handled as `overlong` says.", low=1)
    overlong: str = option(
        "skip", "skip counts them, error stops, truncate_left cuts.", choices=("skip", "error", "truncate_left")
    )
    invalid: str = option("error", "What to do with an empty prompt.", choices=("error", "skip"))


@dataclass
class KLConfig:
    """The pull towards the reference policy."""

    coef: float = option(0.05, "Its strength; 0 has no reference.", low=0)
    where: str = option("reward", "reward takes it off the reward, loss adds it to the loss.", choices=("reward", "loss"))
    kind: str = option("k1", "Its estimator.", choices=("k1", "abs", "k2", "k3"))
    target: float | None = option(
        None, "Adapts coef so that a completion's KL comes to this many nats; null keeps coef.", above=0
    )
    horizon: float = option(10000.0, "Completions over which it adapts.", low=1)


@dataclass
class EngineConfig:
    """The embedded generation engine."""

    max_sequences: int = option(256, "Sequences in its batch at once.", low=1)
    max_batch_tokens: int = option(4096, "Tokens through the model at once; longer prompts go in chunks.", low=1)
    cache_tokens: int | None = option(
        None, "Positions of the key-value cache; null is what a rollout needs, 2 GiB at most.", low=16
    )


@dataclass
class OnPolicyConfig:
    """Every option of an on-policy algorithm but its own."""

    run: RunConfig = section(RunConfig, "Where the run lives.")
    parallel: ParallelConfig = section(ParallelConfig, "How it is spread over processes.")
    model: ModelConfig = section(ModelConfig, "The policy, and where the reference starts.")
    data: PromptConfig = section(PromptConfig, "Prompts.")
    rewards: list[RewardSource] = option([], "Reward sources; their weighted sum is the reward.")
    steps: int = option(100, "Rollouts.", low=1)
    prompts_per_step: int = option(64, "Prompts of a rollout.", low=1)
    completions_per_prompt: int = option(1, "Completions of each.", low=1)
    sampling: SamplingConfig = section(SamplingConfig, "How completions are drawn.")
    generation: GenerationConfig = section(GenerationConfig, "Where completions are drawn.")
    engine: EngineConfig = section(EngineConfig, "The embedded engine, in the trainer's process or in its own.")
    score: ScoreConfig = section(ScoreConfig, "Penalties on top of the rewards.")
    kl: KLConfig = section(KLConfig, "The pull towards the reference.")
    update: UpdateConfig = section(UpdateConfig, "How a rollout is used.")
    eval_temperature: float = option(0.0, "Of the completions of an evaluation.", low=0)


class OnPolicy(ABC):
    """An `Algorithm` of the loop; `learn` is what a subclass adds."""

    name = "on-policy"

    def __init__(self, config: OnPolicyConfig) -> None:
        self.config = config
        seed = config.run.seed
        self.steps, self.timers = config.steps, Timers(torch.cuda.synchronize if torch.cuda.is_available() else None)
        self.parallel = Layout.create(config.parallel)
        self.groups = self.parallel.groups
        self.rollout_size = config.prompts_per_step * config.completions_per_prompt
        self.policy = Policy(
            config.model, config.update, reference=config.kl.coef > 0, seed=seed, total_steps=config.steps,
            rollout_size=self.rollout_size, temperature=config.sampling.temperature, parallel=self.parallel,
        )  # fmt: skip
        model = self.policy.model
        context = model.config.max_position_embeddings
        if config.data.max_prompt_tokens + config.sampling.max_tokens > context:
            raise ConfigError(
                f"data.max_prompt_tokens: {config.data.max_prompt_tokens} and sampling.max_tokens {config.sampling.max_tokens} "
                f"exceed the model's context of {context}"
            )
        self.tokenizer = self.policy.tokenizer
        self.prompts = PromptStream(self._dataset(config.data.path), seed)
        self.held_out = (
            None if config.data.held_out is None else self._dataset(config.data.held_out, config.data.held_out_limit)
        )
        self.rewards = Rewards(
            config.rewards, max_tokens=config.update.micro_batch_tokens, vocab_size=model.config.vocab_size,
            device=self.policy.device, dtype=model.dtype, parallel=self.parallel,
        )  # fmt: skip
        if config.generation.engine != "embedded" and self.groups.world.size > 1:
            raise ConfigError(
                f"generation.engine: {config.generation.engine} serves a run of one process, this has {self.groups.world.size}"
            )
        resharded = Resharded(model, config.parallel.reshard)
        engine = make_engine(
            config.generation, resharded.decoder, self.tokenizer, config.model.path, max_sequences=config.engine.max_sequences,
            max_batch_tokens=config.engine.max_batch_tokens, cache_tokens=config.engine.cache_tokens,
        )  # fmt: skip
        self.engine = Fleet(engine, self.groups, resharded, balance=config.parallel.balance)
        self._version = 0  # steps that the weights have behind them
        kl = config.kl
        self.kl: AdaptiveKL | FixedKL = FixedKL(kl.coef) if kl.target is None else AdaptiveKL(kl.coef, kl.target, kl.horizon)
        self._samples: list[dict[str, Any]] = []

    @property
    def touched(self) -> bool:
        return self.policy.touched

    def _dataset(self, path: str, limit: int | None = None) -> PromptDataset:
        data = self.config.data
        return PromptDataset(
            open_rows(path.split(","), limit=limit), self.tokenizer, max_tokens=data.max_prompt_tokens,
            prompt_field=data.prompt_field, template=data.template, overlong=data.overlong, invalid=data.invalid,
        )  # fmt: skip

    def step(self, step: int, progress: Progress) -> dict[str, Value]:
        self.policy.touched = False
        config = self.config
        metrics = self._refit(step - 1)
        sampling = config.sampling.sampling(config.completions_per_prompt, self.tokenizer.eos_token_id)
        rollout = collect(
            self.engine, self.prompts.next(config.prompts_per_step), sampling, self.rewards, config.score, self.tokenizer,
            seed=mix(config.run.seed, step), device=self.policy.device, timers=self.timers, progress=progress,
        )  # fmt: skip
        tokens = sum(map(len, rollout.sequences.tokens))
        if self.policy.needs_old_logprobs or self.needs_logprobs:
            with self.timers("logprobs", tokens), progress.phase("logprobs"):
                rollout.logprobs = self.policy.logprobs(rollout.sequences)
        if config.kl.coef > 0:
            with self.timers("reference", tokens), progress.phase("reference"):
                rollout.ref_logprobs = self.policy.reference_logprobs(rollout.sequences)
        metrics |= rollout.metrics
        if self.engine.resharded.replicas.size > 1:
            metrics["generate/idle"] = self.engine.idle
        metrics |= self.learn(rollout, step, progress)
        self._version = step
        recomputed = rollout.first_logprobs if rollout.logprobs is None else rollout.logprobs
        if recomputed is not None:
            drift = logprob_drift(rollout.rollout_logprobs, recomputed, rollout.mask, cu_seqlens=rollout.cu_seqlens)
            metrics["drift"] = drift.stats
        metrics |= {
            "data/epoch": float(self.prompts.epoch),
            "data/skipped": float(self.prompts.skipped),
            "data/invalid": float(self.prompts.invalid),
        }
        self._samples = rollout.samples(SAMPLES)
        return metrics

    def _refit(self, version: int) -> dict[str, Value]:
        """The engine generates with the policy as it is now."""
        with self.timers("refit"):
            return dict(self.engine.update_weights(None, version).metrics())

    def close(self) -> None:
        """Ends the engine."""
        self.engine.close()

    @property
    def needs_logprobs(self) -> bool:
        """Whether `learn` needs the old log-probs although the update does not."""
        return self.config.kl.where == "reward" and self.config.kl.coef > 0

    @abstractmethod
    def learn(self, rollout: Rollout, step: int, progress: Progress) -> dict[str, Value]:
        """Advantages and updates; metrics."""

    def update_policy(self, rollout: Rollout, advantages: Tensor, step: int, progress: Progress) -> dict[str, Value]:
        kl = self.config.kl
        in_loss = kl.coef > 0 and kl.where == "loss"
        with (
            self.timers("policy", sum(map(len, rollout.sequences.tokens)) * self.config.update.epochs),
            progress.phase("policy"),
        ):
            stats = self.policy.update(
                rollout, advantages, step=step, kl_coef=self.kl.coef if in_loss else 0.0, kl=kl.kind
            )  # fmt: skip
        return {f"policy/{name}": value for name, value in stats.items()}

    def adapt_kl(self, per_completion: float) -> dict[str, Value]:
        """Metrics of the KL coefficient used in this step; then it follows the observed KL, nats a completion."""
        used = self.kl.coef
        self.kl.update(per_completion, self.rollout_size)
        return {"kl_coef": used}

    def evaluate(self, progress: Progress) -> dict[str, Value]:
        """The rewards of held-out prompts, one completion each."""
        if self.held_out is None:
            return {}
        prompts = [p for i in range(len(self.held_out)) if (p := self.held_out[i]) is not None]
        if not prompts:
            raise ConfigError(f"data.held_out: every prompt is longer than {self.config.data.max_prompt_tokens} tokens")
        drawn = self.config.sampling.sampling(1, self.tokenizer.eos_token_id)
        sampling = replace(drawn, temperature=self.config.eval_temperature)
        self._refit(self._version)
        rollout = collect(
            self.engine, prompts, sampling, self.rewards, ScoreConfig(), self.tokenizer, seed=self.config.run.seed,
            device=self.policy.device, timers=self.timers, progress=progress,
        )  # fmt: skip
        self._samples = rollout.samples(SAMPLES)
        metrics: dict[str, Value] = dict(rollout.metrics)
        if self.config.kl.coef > 0:
            gap = self.policy.logprobs(rollout.sequences) - self.policy.reference_logprobs(rollout.sequences)
            metrics["kl"] = float(gap.mean())
        return metrics

    def samples(self) -> list[dict[str, Any]]:
        return self._samples

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return self.policy.tensors()

    def state(self) -> dict[str, Any]:
        return {"policy": self.policy.state(), "prompts": self.prompts.state_dict(), "kl_coef": self.kl.coef}

    def prepare(self, state: Mapping[str, Any]) -> None:
        self.policy.optimizer.prepare(state["policy"])

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        self.policy.restore(dict(tensors), state["policy"])  # type: ignore[arg-type]
        self.prompts.load_state_dict(state["prompts"])
        self.kl.coef = state["kl_coef"]

    def export(self, directory: Path) -> None:
        self.policy.save(directory)
