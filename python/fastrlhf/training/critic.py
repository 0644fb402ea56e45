"""The critic: values of states, and their update."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import option, section
from ..errors import ConfigError
from ..models import load_scalar_model, save_scalar_model
from ..ops import value_loss
from ..parallel.collectives import summed
from .averages import Averages
from .batches import Sequences, completion_values, micro_batches
from .layout import Layout
from .optim import Optimizer, OptimizerConfig, trainable
from .passes import assembled, run
from .policy import minibatches
from .rollout import Rollout
from .shards import weights_of
from .state import load_into


@dataclass
class CriticConfig:
    """A model of its own that says what a state is worth."""

    path: str | None = option(None, "Directory it starts from, a reward model's or a language model's; null is the policy's.")
    clip: float | None = option(
        0.2, "Values move at most this far from the rollout's within an update; null does not clip.", above=0
    )
    epochs: int = option(1, "Passes over a rollout.", low=1)
    minibatch_size: int | None = option(None, "Completions of one optimizer step; null is the whole rollout.", low=1)
    micro_batch_tokens: int = option(8192, "Tokens through the model at once, padding counted; changes no result.", low=1)
    warmup_steps: int = option(0, "Steps at the start in which only the critic learns.", low=0)
    checkpoint_activations: bool = option(False, "Keep only each layer's input and compute the rest again in the backward.")
    optimizer: OptimizerConfig = section(OptimizerConfig, "How weights move.", lr=9e-6)


class Critic:
    def __init__(
        self, config: CriticConfig, path: str, *, seed: int, total_steps: int, rollout_size: int, vocab_size: int,
        device: torch.device, dtype: torch.dtype | None, parallel: Layout | None = None,
    ) -> None:  # fmt: skip
        self.config, self.seed = config, seed
        start, parallel = config.path or path, parallel or Layout()
        self.model = load_scalar_model(start, device=device, dtype=dtype, seed=seed, **parallel.of(start))
        self.groups = self.model.decoder.groups
        if self.model.decoder.config.vocab_size != vocab_size:
            raise ConfigError(
                f"critic.path: {config.path} has a vocabulary of {self.model.decoder.config.vocab_size}, "
                f"the policy of {vocab_size}"
            )
        self.model.decoder.checkpoint_activations = config.checkpoint_activations
        self.minibatch = min(config.minibatch_size or rollout_size, rollout_size)
        steps = total_steps * config.epochs * -(-rollout_size // self.minibatch)
        self.optimizer = Optimizer(trainable(self.model), config.optimizer, steps, self.groups)

    def values(self, sequences: Sequences) -> Tensor:
        """(tokens) of the completions, packed."""
        return completion_values(self.model, sequences, max_tokens=self.config.micro_batch_tokens)

    def update(self, rollout: Rollout, returns: Tensor, *, step: int) -> dict[str, float]:
        """Epochs of minibatches over a rollout, towards `returns` (tokens)."""
        averages = Averages()
        for epoch in range(self.config.epochs):
            for members in minibatches(len(rollout), self.minibatch, self.seed, step, epoch):
                total = self._accumulate(rollout, returns, members, averages)
                for name, value in self.optimizer.step("critic", total).items():
                    averages.value(name, value)
                averages.value("loss", total)
        return averages.pop(self.groups)

    def _accumulate(self, rollout: Rollout, returns: Tensor, members: list[int], averages: Averages) -> Tensor:
        """The gradient of a minibatch's loss; the loss."""
        values, device = rollout.values, returns.device
        assert values is not None
        lengths = rollout.sequences.completion_lengths
        tokens = float(sum(lengths[m] for m in members))
        total, predicted = torch.zeros((), device=device), torch.zeros_like(returns)
        most = self.config.micro_batch_tokens
        batches = list(micro_batches(rollout.sequences, members, most, device, self.groups))

        def last(i: int, hidden: Tensor) -> Tensor:
            batch = batches[i]
            new = self.model.of_hidden(hidden[batch.at])
            out = value_loss(
                new, values[batch.rows], returns[batch.rows], None,
                clip=self.config.clip, denominator=tokens, cu_seqlens=batch.cu_seqlens,
            )  # fmt: skip
            predicted[batch.rows] = new.detach()
            total.add_(out.loss.detach())
            averages.add(out.stats, leave_out=("explained_variance",))
            return out.loss

        run(self.model.decoder, [(b.tokens, b.pack) for b in batches], last)
        rows = torch.zeros_like(returns)
        cu = rollout.sequences.offsets.tolist()
        for m in members:
            rows[cu[m] : cu[m + 1]] = 1
        seen = rows.bool()
        averages.value("explained_variance", explained_variance(assembled(predicted, self.groups)[seen], returns[seen]), tokens)
        return summed(total, self.groups.replicas)

    def save(self, directory: Path, tokenizer: Any) -> None:
        save_scalar_model(self.model, directory, tokenizer=tokenizer)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {
            "critic": weights_of(trainable(self.model), self.groups), "critic_optimizer": self.optimizer.save()[0],
        }  # fmt: skip

    def state(self) -> dict[str, Any]:
        return self.optimizer.save()[1]

    def restore(self, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        load_into(trainable(self.model), tensors["critic"], "critic")
        self.optimizer.load(tensors["critic_optimizer"], state)


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns)."""
    variance = torch.var(returns, correction=0)
    return float(1 - torch.var(returns - values, correction=0) / variance.clamp(min=1e-12))
