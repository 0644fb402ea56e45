"""Reward models from preferences: -log σ(r_chosen - r_rejected), the mean over the pairs of the whole batch
(Bradley and Terry 1952; Ouyang et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import REQUIRED, option, section
from ..data import Preference, PreferenceDataset, PreferenceStream, batches_by_tokens, open_rows, split
from ..errors import ConfigError
from ..models import Packed, load_scalar_model, save_scalar_model
from ..models.checkpoint import trainable
from ..ops import reward_loss
from ..training.averages import Averages
from ..training.loop import RunConfig
from ..training.metrics import Value
from ..training.optim import Optimizer, OptimizerConfig
from ..training.policy import ModelConfig, load_matching_tokenizer
from ..training.progress import Progress
from ..training.state import load_into
from ..training.timers import Timers


@dataclass
class PreferenceConfig:
    """Pairs {"prompt", "chosen", "rejected"}, or HH-RLHF's own form: JSONL (.gz), Parquet, a saved dataset or hf:name."""

    path: str = option(REQUIRED, "File, several separated by commas, or dataset.")
    held_out: str | None = option(None, "The same, to evaluate on; null evaluates nothing.")
    held_out_limit: int | None = option(None, "Evaluate on the first so many of `held_out`.", low=1)
    held_out_share: float = option(0.0, "Share of `path` to hold out instead, the same for the same seed.", low=0, high=0.9)
    prompt_field: str = option("prompt", "Field with the prompt.")
    prompt_template: str | None = option(None, 'Builds the prompt from fields instead, as "Question: {question}\\nAnswer:".')
    margin_field: str = option("margin", "Field with the margin, where there is one.")
    max_tokens: int = option(1024, "Of the prompt with its longer completion.", low=1)
    overlong: str = option("skip", "skip counts them, error stops, truncate cuts.", choices=("skip", "error", "truncate"))
    invalid: str = option("error", "An empty completion, or sides that share no prompt.", choices=("error", "skip"))


@dataclass
class RewardConfig:
    """fastrlhf train reward"""

    run: RunConfig = section(RunConfig, "Where the run lives.")
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


class RewardTraining:
    name = "reward"

    def __init__(self, config: RewardConfig) -> None:
        self.config, self.steps = config, config.steps
        if config.model.lora.rank:
            raise ConfigError(f"model.lora.rank: reward models are trained whole, expected 0, got {config.model.lora.rank}")
        self.timers = Timers(torch.cuda.synchronize if torch.cuda.is_available() else None)
        self.device = torch.device(config.model.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = getattr(torch, config.model.dtype) if config.model.dtype else None
        self.model = load_scalar_model(config.model.path, device=self.device, dtype=dtype, seed=config.run.seed)
        self.model.decoder.checkpoint_activations = config.model.checkpoint_activations
        self.tokenizer = load_matching_tokenizer(config.model.path, self.model.decoder)
        train, held_out = self._rows()
        self.stream = PreferenceStream(self._dataset(train), config.run.seed)
        self.held_out = None if held_out is None else self._dataset(held_out)
        self.optimizer = Optimizer(trainable(self.model), config.optimizer, config.steps)
        self.touched = False

    def _rows(self) -> tuple[Any, Any]:
        data = self.config.data
        rows = open_rows(data.path.split(","))
        if data.held_out is not None and data.held_out_share:
            raise ConfigError("data.held_out_share: expected 0 beside data.held_out; one of them says what is held out")
        if data.held_out is not None:
            return rows, open_rows(data.held_out.split(","), limit=data.held_out_limit)
        if not data.held_out_share:
            return rows, None
        return split(rows, data.held_out_share, self.config.run.seed)

    def _dataset(self, rows: Any) -> PreferenceDataset:
        data = self.config.data
        return PreferenceDataset(
            rows, self.tokenizer, max_tokens=min(data.max_tokens, self.model.decoder.config.max_position_embeddings),
            prompt_field=data.prompt_field, prompt_template=data.prompt_template, margin_field=data.margin_field,
            overlong=data.overlong, invalid=data.invalid,
        )  # fmt: skip

    def step(self, step: int, progress: Progress) -> Mapping[str, Value]:
        self.touched = False
        pairs = self.stream.next(self.config.batch_size)
        count = sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)
        with self.timers("train", count), progress.phase("train"):
            metrics, chosen, rejected = self.accumulate(pairs)
            taken = self.optimizer.step("reward", torch.tensor(metrics["loss"]))
            self.touched = True
            if self.config.standardize:
                self._follow(torch.cat([chosen, rejected]))
        data = {"epoch": self.stream.epoch, "skipped": self.stream.skipped, "invalid": self.stream.invalid}
        return metrics | taken | {f"data/{name}": float(value) for name, value in data.items()}

    def accumulate(self, pairs: list[Preference]) -> tuple[dict[str, float], Tensor, Tensor]:
        """The gradient of the batch's loss, in as many micro-batches as it takes; without one where none is wanted.
        Metrics and the rewards of both sides."""
        averages = Averages()
        sides = ([p.prompt + p.chosen for p in pairs], [p.prompt + p.rejected for p in pairs])
        longest = [max(len(a), len(b)) for a, b in zip(*sides, strict=True)]
        rewards = torch.empty(2, len(pairs), device=self.device)
        # a pair's two sides go together: their difference is the loss
        for group in batches_by_tokens(longest, max(self.config.micro_batch_tokens // 2, 1)):
            tokens, pack = Packed.of([side[i] for side in sides for i in group], self.device)
            hidden = self.model.decoder(tokens, pack)[pack.cu_seqlens[1:] - 1]
            chosen, rejected = self.model.of_hidden(hidden).split(len(group))
            margins = None if self.config.loss == "bt" else torch.tensor([self._margin(pairs[i]) for i in group])
            out = reward_loss(
                chosen, rejected, None if margins is None else margins.to(self.device), kind=self.config.loss,
                denominator=float(len(pairs)),
            )  # fmt: skip
            if torch.is_grad_enabled():
                out.loss.backward()
            rewards[:, torch.tensor(group, device=self.device)] = torch.stack([chosen, rejected]).detach()
            averages.value("loss", out.losses.detach().mean(), float(len(group)))
        metrics = averages.pop()
        gap = rewards[0] - rewards[1]
        metrics |= {
            "accuracy": float(((gap > 0).float() + 0.5 * (gap == 0)).mean()), "reward_margin": float(gap.mean()),
            "rewards/chosen": float(rewards[0].mean()), "rewards/rejected": float(rewards[1].mean()),
        }  # fmt: skip
        return metrics, rewards[0], rewards[1]

    def _margin(self, pair: Preference) -> float:
        if pair.margin is None:
            where = self.stream.dataset.rows.name
            raise ConfigError(f"loss: {self.config.loss} needs a margin with every pair; row {pair.index} of {where} has none")
        return pair.margin

    def _follow(self, rewards: Tensor) -> None:
        """Mean and deviation of the rewards of the last batches, a tenth of the way at a time."""
        model, share = self.model, 1.0 if self.optimizer.steps == 1 else 0.1
        model.mean += share * (float(rewards.mean()) - model.mean)
        model.std += share * (max(float(rewards.std(correction=0)), 1e-3) - model.std)

    @torch.no_grad()
    def evaluate(self, progress: Progress) -> dict[str, Value]:
        """Loss and accuracy on held-out pairs."""
        if self.held_out is None:
            return {}
        found = [p for i in range(len(self.held_out)) if (p := self.held_out[i]) is not None]
        if not found:
            raise ConfigError(f"data.held_out: no pair in it has at most {self.held_out.max_tokens} tokens")
        averages = Averages()
        for i in range(0, len(found), self.config.batch_size):
            part = found[i : i + self.config.batch_size]
            for name, value in self.accumulate(part)[0].items():
                averages.value(name, value, float(len(part)))
        return {**averages.pop(), "pairs": float(len(found))}

    def samples(self) -> list[dict[str, Any]]:
        return []

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {"model": dict(trainable(self.model)), "optimizer": self.optimizer.save()[0]}

    def state(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.save()[1], "data": self.stream.state_dict(), "mean": self.model.mean,
            "std": self.model.std,
        }  # fmt: skip

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        load_into(trainable(self.model), tensors["model"], "model")
        self.optimizer.load(tensors["optimizer"], state["optimizer"])
        self.stream.load_state_dict(state["data"])
        self.model.mean, self.model.std = state["mean"], state["std"]

    def export(self, directory: Path) -> None:
        save_scalar_model(self.model, directory, tokenizer=self.tokenizer)
