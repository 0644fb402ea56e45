"""The policy: its model, its reference, and the update that its loss asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import REQUIRED, option, section
from ..data import load_tokenizer
from ..errors import ConfigError
from ..models import Decoder, add_lora, load_decoder, save_decoder, token_logprobs
from ..models.lora import PROJECTIONS
from ..models.placement import device_of, dtype_of
from ..ops import policy_loss
from ..parallel.collectives import summed
from .averages import Averages
from .batches import Sequences, completion_logprobs, micro_batches
from .layout import Layout
from .optim import Optimizer, OptimizerConfig, trainable
from .passes import assembled, run
from .reference import Reference
from .rollout import Rollout
from .shards import weights_of
from .state import load_into


@dataclass
class LoraConfig:
    """Low-rank adapters; with them the reference is the same weights with the adapters off."""

    rank: int = option(0, "0 trains all weights.", low=0)
    alpha: float | None = option(None, "The adapters' scale is alpha / rank; null is 2 · rank.", low=0)
    targets: list[str] = option(list(PROJECTIONS), "Projections that get one.", choices=PROJECTIONS)


@dataclass
class ModelConfig:
    """A Hugging Face directory of the Llama family."""

    path: str = option(REQUIRED, "The directory.")
    dtype: str | None = option(None, "Of the weights; null is the directory's.", choices=("float32", "bfloat16", "float16"))
    device: str | None = option(None, "cpu, cuda, cuda:1; null is cuda where there is one.")
    checkpoint_activations: bool = option(False, "Keep only each layer's input and compute the rest again in the backward.")
    lora: LoraConfig = section(LoraConfig, "Adapters instead of all weights.")


@dataclass
class PolicyLossConfig:
    """`fastrlhf.policy_loss`."""

    kind: str = option("ppo", "Which loss.", choices=("ppo", "reinforce", "gpg", "cispo", "sapo", "gspo", "gmpo"))
    clip_low: float = option(0.2, "The ratio is clipped below at 1 - clip_low.", low=0)
    clip_high: float = option(0.2, "And above at 1 + clip_high; larger than clip_low is DAPO's clip-higher.", low=0)
    dual_clip: float | None = option(None, "Bounds the loss at negative advantages by -dual_clip · A; null does not.", above=1)
    reduction: str = option(
        "token-mean", "How tokens become one number.",
        choices=("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"),
    )  # fmt: skip
    entropy_coef: float = option(0.0, "Entropy bonus.", low=0)
    rollout_correction: str | None = option(
        None, "Weights tokens by how far the engine's log-probs are from the trainer's; null does not.",
        choices=("tis", "mis", "icepop"),
    )  # fmt: skip


@dataclass
class UpdateConfig:
    """How a rollout is used."""

    epochs: int = option(1, "Passes over a rollout.", low=1)
    minibatch_size: int | None = option(None, "Completions of one optimizer step; null is the whole rollout.", low=1)
    micro_batch_tokens: int = option(8192, "Tokens through the model at once, padding counted; changes no result.", low=1)
    optimizer: OptimizerConfig = section(OptimizerConfig, "How weights move.")
    loss: PolicyLossConfig = section(PolicyLossConfig, "The policy's loss.")


def load_model(config: ModelConfig, seed: int, parallel: Layout | None = None) -> tuple[Decoder, torch.device]:
    """The decoder a section describes, in training mode, adapters on; this process's part of it."""
    device, dtype, parallel = device_of(config.device), dtype_of(config.dtype), parallel or Layout()
    model = load_decoder(config.path, device=device, dtype=dtype, **parallel.of(config.path))
    model.checkpoint_activations = config.checkpoint_activations
    if config.lora.rank:
        if parallel.groups.pp.size > 1:
            raise ConfigError(f"model.lora.rank: not yet with a pipeline, expected 0 with pp={parallel.groups.pp.size}")
        add_lora(model, rank=config.lora.rank, alpha=config.lora.alpha, targets=config.lora.targets, seed=seed)
    return model, device


def load_matching_tokenizer(path: str, model: Decoder) -> Any:
    """A directory's tokenizer.

    Raises:
        ConfigError: it has more tokens than the model.
    """
    tokenizer = load_tokenizer(path)
    if len(tokenizer) > model.config.vocab_size:
        raise ConfigError(
            f"model.path: the tokenizer in {path} has {len(tokenizer)} tokens, the model {model.config.vocab_size}"
        )
    return tokenizer


class Policy:
    """
    Args:
        reference: whether a reference policy is wanted: the adapters off, or a second copy of the weights as they are now.
        total_steps: rollouts over which the learning rate's schedule runs.
        rollout_size: completions in a rollout.
    """

    def __init__(
        self, model: ModelConfig, update: UpdateConfig, *, reference: bool, seed: int, total_steps: int, rollout_size: int,
        temperature: float, parallel: Layout | None = None,
    ) -> None:  # fmt: skip
        self.config, self.seed, self.temperature = update, seed, temperature
        parallel = parallel or Layout()
        self.model, self.device = load_model(model, seed, parallel)
        self.groups = self.model.groups
        self.tokenizer = load_matching_tokenizer(model.path, self.model)
        self.minibatch = min(update.minibatch_size or rollout_size, rollout_size)
        self.steps_per_rollout = update.epochs * -(-rollout_size // self.minibatch)
        self.optimizer = Optimizer(trainable(self.model), update.optimizer, total_steps * self.steps_per_rollout, self.groups)
        self.reference = Reference(self.model, model.path, parallel) if reference else None
        self.touched = False

    def logprobs(self, sequences: Sequences) -> Tensor:
        return completion_logprobs(
            self.model, sequences, max_tokens=self.config.micro_batch_tokens, temperature=self.temperature
        )

    def reference_logprobs(self, sequences: Sequences) -> Tensor:
        assert self.reference is not None
        with self.reference.model() as model:
            return completion_logprobs(
                model, sequences, max_tokens=self.config.micro_batch_tokens, temperature=self.temperature
            )

    @property
    def needs_old_logprobs(self) -> bool:
        """False where the first and only step's own log-probs are the old ones."""
        return self.steps_per_rollout > 1

    def update(
        self, rollout: Rollout, advantages: Tensor, *, step: int, kl_coef: float = 0.0, kl: str = "k3"
    ) -> dict[str, float]:
        """Epochs of minibatches over a rollout. `advantages`: (tokens), or (N), one for each completion. With `kl_coef` the
        KL to the reference is in the loss."""
        averages = Averages()
        for epoch in range(self.config.epochs):
            for members in minibatches(len(rollout), self.minibatch, self.seed, step, epoch):
                loss = self._accumulate(rollout, advantages, members, averages, kl_coef, kl)
                taken = self.optimizer.step("policy", loss)
                self.touched = True
                for name, value in taken.items():
                    averages.value(name, value)
                averages.value("loss", loss)
        return averages.pop(self.groups)

    def _accumulate(
        self, rollout: Rollout, advantages: Tensor, members: list[int], averages: Averages, kl_coef: float, kl: str
    ) -> Tensor:
        """The gradient of a minibatch's loss, to the bit the same however it is cut but for the order of additions."""
        config = self.config.loss
        denominator = _denominator(rollout, members, config.reduction)
        total = torch.zeros((), device=self.device)
        per_token = advantages.shape[0] == rollout.mask.shape[0]
        batches = list(micro_batches(rollout.sequences, members, self.config.micro_batch_tokens, self.device, self.groups))

        first = torch.zeros_like(rollout.rollout_logprobs)

        def last(i: int, hidden: Tensor) -> Tensor:
            batch = batches[i]
            new = token_logprobs(self.model, hidden[batch.at], batch.labels, temperature=self.temperature, entropy=True)
            assert new.entropy is not None
            first[batch.rows] = new.logprobs.detach()
            picked = torch.tensor(batch.members, device=self.device)
            out = policy_loss(
                new.logprobs,
                new.logprobs.detach() if rollout.logprobs is None else rollout.logprobs[batch.rows],
                advantages[batch.rows] if per_token else advantages[picked],
                rollout.mask[batch.rows],
                kind=config.kind, clip_low=config.clip_low, clip_high=config.clip_high, dual_clip=config.dual_clip,
                rollout_logprobs=rollout.rollout_logprobs[batch.rows],
                rollout_correction=config.rollout_correction,
                ref_logprobs=None if rollout.ref_logprobs is None else rollout.ref_logprobs[batch.rows],
                kl_coef=kl_coef, kl=kl,
                entropy=new.entropy if config.entropy_coef else new.entropy.detach(), entropy_coef=config.entropy_coef,
                reduction=config.reduction, denominator=denominator, cu_seqlens=batch.cu_seqlens,
            )  # fmt: skip
            total.add_(out.loss.detach())
            averages.add(out.stats)
            return out.loss

        run(self.model, [(b.tokens, b.pack) for b in batches], last)
        if rollout.logprobs is None:  # the only step's minibatch is the whole rollout
            rollout.first_logprobs = assembled(first, self.groups)
        return summed(total, self.groups.replicas)

    def save(self, directory: Path) -> None:
        save_decoder(self.model, directory, tokenizer=self.tokenizer)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {
            "policy": weights_of(trainable(self.model), self.groups), "policy_optimizer": self.optimizer.save()[0],
        }  # fmt: skip

    def state(self) -> dict[str, Any]:
        return self.optimizer.save()[1]

    def restore(self, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        load_into(trainable(self.model), tensors["policy"], "policy")
        self.optimizer.load(tensors["policy_optimizer"], state)


def minibatches(size: int, minibatch: int, seed: int, step: int, epoch: int) -> list[list[int]]:
    """The rollout in an order of its own for each step and epoch, cut into minibatches; the last may be smaller."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 1_009 + epoch)
    order = torch.randperm(size, generator=generator).tolist()
    return [sorted(order[i : i + minibatch]) for i in range(0, size, minibatch)]


def _denominator(rollout: Rollout, members: list[int], reduction: str) -> float:
    counted = [rollout.counted[m] for m in members]
    if reduction == "token-mean":
        return float(max(sum(counted), 1))
    sequences = max(sum(c > 0 for c in counted), 1)
    if reduction == "seq-mean-token-sum-norm":
        return float(sequences * max(rollout.sequences.completion_lengths))
    return float(sequences)
