"""Reward models from preferences: -log σ(r_chosen - r_rejected), the mean over the pairs of the whole batch
(Bradley and Terry 1952; Ouyang et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import option, section
from ..data import Preference
from ..errors import ConfigError
from ..models import Packed, ScalarModel, load_scalar_model, save_scalar_model
from ..models.placement import device_of, dtype_of
from ..ops import reward_loss
from ..training.averages import Averages
from ..training.batches import own_groups
from ..training.layout import Layout, ParallelConfig
from ..training.loop import RunConfig
from ..training.metrics import Value
from ..training.optim import OptimizerConfig
from ..training.pairs import PreferenceConfig, margins_of, open_pairs
from ..training.passes import assembled, run
from ..training.policy import ModelConfig, load_matching_tokenizer
from ..training.progress import Progress
from ..training.supervised import Supervised


@dataclass
class RewardConfig:
    """A reward model from preference pairs."""

    run: RunConfig = section(RunConfig, "Where the run lives.")
    parallel: ParallelConfig = section(ParallelConfig, "How it is spread over processes.")
    model: ModelConfig = section(ModelConfig, "The language model, or reward model, to start from.")
    data: PreferenceConfig = section(PreferenceConfig, "Preferences.")
    steps: int = option(100, "Optimizer steps.", low=1)
    batch_size: int = option(64, "Pairs of a step.", low=1)
    micro_batch_tokens: int = option(8192, "Tokens through the model at once, padding counted; changes no result.", low=1)
    loss: str = option(
        "bt", "bt; margin_bt takes a pair's margin off the difference; scaled_bt multiplies its loss by it.",
        choices=("bt", "margin_bt", "scaled_bt"),
    )  # fmt: skip
    standardize: bool = option(True, "Keep the rewards' mean and deviation with the model, which its users then apply.")
    optimizer: OptimizerConfig = section(OptimizerConfig, "How weights move.", lr=9e-6, schedule="cosine", warmup_steps=10)


class RewardTraining(Supervised[Preference]):
    name = "reward"
    model: ScalarModel

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        if config.model.lora.rank:
            raise ConfigError(f"model.lora.rank: reward models are trained whole, expected 0, got {config.model.lora.rank}")
        self.device, dtype = device_of(config.model.device), dtype_of(config.model.dtype)
        parallel, path = Layout.create(config.parallel), config.model.path
        model = load_scalar_model(path, device=self.device, dtype=dtype, seed=config.run.seed, **parallel.of(path))
        model.decoder.checkpoint_activations = config.model.checkpoint_activations
        self.tokenizer = load_matching_tokenizer(config.model.path, model.decoder)
        context = model.decoder.config.max_position_embeddings
        stream, held_out = open_pairs(config.data, self.tokenizer, context, config.run.seed)
        super().__init__(
            model, stream, held_out, config.optimizer, steps=config.steps, batch_size=config.batch_size,
            groups=parallel.groups,
        )  # fmt: skip

    def accumulate(self, examples: Sequence[Preference]) -> dict[str, float]:
        """Leaves the rewards of both sides in `rewards`, (2, B)."""
        averages = Averages()
        sides = ([p.prompt + p.chosen for p in examples], [p.prompt + p.rejected for p in examples])
        longest = [max(len(a), len(b)) for a, b in zip(*sides, strict=True)]
        rewards = torch.zeros(2, len(examples), device=self.device)
        # a pair's two sides go together: their difference is the loss
        members = own_groups(longest, max(self.config.micro_batch_tokens // 2, 1), self.groups)
        inputs = [Packed.of([side[i] for side in sides for i in group], self.device) for group in members]

        def last(i: int, hidden: Tensor) -> Tensor:
            group, (_, pack) = members[i], inputs[i]
            ends = hidden[pack.cu_seqlens[1:] - 1]
            chosen, rejected = self.model.of_hidden(ends).split(len(group))
            margins = (
                None if self.config.loss == "bt" else margins_of([examples[i] for i in group], self.stream, self.config.loss)
            )
            out = reward_loss(
                chosen, rejected, None if margins is None else margins.to(self.device), kind=self.config.loss,
                denominator=float(len(examples)),
            )  # fmt: skip
            rewards[:, torch.tensor(group, device=self.device)] = torch.stack([chosen, rejected]).detach()
            averages.value("loss", out.losses.detach().mean(), float(len(group)))
            return out.loss

        run(self.model.decoder, inputs, last)
        rewards = assembled(rewards, self.groups)
        metrics = averages.pop(self.groups)
        gap = rewards[0] - rewards[1]
        metrics |= {
            "accuracy": float(((gap > 0).float() + 0.5 * (gap == 0)).mean()), "reward_margin": float(gap.mean()),
            "rewards/chosen": float(rewards[0].mean()), "rewards/rejected": float(rewards[1].mean()),
        }  # fmt: skip
        self.rewards = rewards
        return metrics

    def length(self, example: Preference) -> int:
        return 2 * len(example.prompt) + len(example.chosen) + len(example.rejected)

    def step(self, step: int, progress: Progress) -> Mapping[str, Value]:
        metrics = super().step(step, progress)
        if self.config.standardize:
            self._follow(self.rewards)
        return metrics

    def _follow(self, rewards: Tensor) -> None:
        """Mean and deviation of the rewards of the last batches, a tenth of the way at a time."""
        model, share = self.model, 1.0 if self.optimizer.steps == 1 else 0.1
        model.mean += share * (float(rewards.mean()) - model.mean)
        model.std += share * (max(float(rewards.std(correction=0)), 1e-3) - model.std)

    def state(self) -> dict[str, Any]:
        return super().state() | {"mean": self.model.mean, "std": self.model.std}

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        super().restore(tensors, state)
        self.model.mean, self.model.std = state["mean"], state["std"]

    def export(self, directory: Path) -> None:
        save_scalar_model(self.model, directory, tokenizer=self.tokenizer)
