"""Direct preference optimization and its relatives: losses on the log-probs of pairs of completions, without a reward model
and without rollouts (Rafailov et al. 2023; the others: `fastrlhf.preference_loss`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..config import option, section
from ..data import Preference
from ..errors import ConfigError
from ..models import Decoder, save_decoder, token_logprobs
from ..ops import preference_loss, sequence_logprobs
from ..training.averages import Averages
from ..training.batches import MicroBatch, Sequences, micro_batch, own_groups
from ..training.layout import Layout, ParallelConfig
from ..training.loop import RunConfig
from ..training.optim import OptimizerConfig
from ..training.pairs import PreferenceConfig, margins_of, open_pairs
from ..training.passes import run
from ..training.policy import ModelConfig, load_matching_tokenizer, load_model
from ..training.reference import Reference
from ..training.supervised import Supervised

AVERAGED = ("simpo", "orpo")  # of length-averaged log-probs, and without a reference
OF_REWARDS = ("rpo_sq", "rpo_fwd_kl", "rpo_bwd_kl")
KINDS = ("dpo", "cdpo", "robust", "ipo", "hinge", *OF_REWARDS, *AVERAGED)


@dataclass
class PreferenceLossConfig:
    """`fastrlhf.preference_loss`."""

    kind: str = option("dpo", "Which loss; the rpo kinds take the margins of the pairs as rewards.", choices=KINDS)
    beta: float = option(0.1, "How strongly the policy is held to the reference; the scale of the log-odds.", above=0)
    label_smoothing: float = option(0.0, "Share of pairs taken to be the wrong way round; cdpo and robust need it.", low=0)
    average: bool | None = option(None, "Log-probs by token instead of whole; null is what the kind is defined for.")
    margin: float = option(0.0, "simpo: by how much the chosen side must be ahead.")
    reward_scale: float = option(1.0, "rpo: what the pairs' margins are multiplied by.", above=0)
    sft_coef: float = option(0.0, "Weight of the chosen side's own loss, -log π.", low=0)
    sft_average: bool = option(True, "That loss by token instead of whole.")


@dataclass
class DPOConfig:
    """Preference pairs, straight into the policy."""

    run: RunConfig = section(RunConfig, "Where the run lives.")
    parallel: ParallelConfig = section(ParallelConfig, "How it is spread over processes.")
    model: ModelConfig = section(ModelConfig, "The policy, and where the reference starts.")
    data: PreferenceConfig = section(PreferenceConfig, "Preferences.")
    steps: int = option(100, "Optimizer steps.", low=1)
    batch_size: int = option(64, "Pairs of a step.", low=1)
    micro_batch_tokens: int = option(8192, "Tokens through the model at once, padding counted; changes no result.", low=1)
    loss: PreferenceLossConfig = section(PreferenceLossConfig, "The loss.")
    optimizer: OptimizerConfig = section(OptimizerConfig, "How weights move.", lr=1e-6, schedule="cosine", warmup_steps=10)


class DPO(Supervised[Preference]):
    name = "dpo"
    model: Decoder

    def __init__(self, config: DPOConfig) -> None:
        self.config = config
        loss = config.loss
        if loss.kind in ("cdpo", "robust") and not loss.label_smoothing:
            raise ConfigError(f"loss.label_smoothing: expected > 0 for {loss.kind}, got 0")
        if loss.label_smoothing >= 0.5:
            raise ConfigError(f"loss.label_smoothing: expected < 0.5, got {loss.label_smoothing}")
        if loss.kind in AVERAGED and loss.average is False:
            raise ConfigError(f"loss.average: {loss.kind} is defined for log-probs by token, got false")
        parallel = Layout.create(config.parallel)
        model, self.device = load_model(config.model, config.run.seed, parallel)
        self.tokenizer = load_matching_tokenizer(config.model.path, model)
        self.reference = None if loss.kind in AVERAGED else Reference(model, config.model.path, parallel)
        stream, held_out = open_pairs(config.data, self.tokenizer, model.config.max_position_embeddings, config.run.seed)
        super().__init__(
            model, stream, held_out, config.optimizer, steps=config.steps, batch_size=config.batch_size,
            groups=parallel.groups,
        )  # fmt: skip

    @property
    def average(self) -> bool:
        """Whether a side's log-prob is its mean over tokens."""
        chosen = self.config.loss.average
        return self.config.loss.kind in AVERAGED if chosen is None else chosen

    def accumulate(self, examples: Sequence[Preference]) -> dict[str, float]:
        averages, loss, total = Averages(), self.config.loss, float(len(examples))
        batches = list(self._batches(examples))
        reference = self._reference_logprobs(batches, len(examples))

        def last(i: int, hidden: Tensor) -> Tensor:
            members, batch = batches[i]
            chosen, rejected = self._of_sides(self.model, batch, hidden)
            rewards = lengths = None
            if loss.kind in OF_REWARDS:
                rewards = margins_of([examples[m] for m in members], self.stream, loss.kind).to(self.device)
            if loss.sft_coef and loss.sft_average and not self.average:
                lengths = batch.cu_seqlens.diff()[: len(members)]
            ref = (None, None) if reference is None else reference[:, torch.tensor(members, device=self.device)]
            out = preference_loss(
                chosen, rejected, *ref, kind=loss.kind, beta=loss.beta, label_smoothing=loss.label_smoothing,
                chosen_rewards=rewards, rejected_rewards=None if rewards is None else torch.zeros_like(rewards),
                reward_scale=loss.reward_scale, margin=loss.margin, sft_coef=loss.sft_coef, chosen_lengths=lengths,
                denominator=total,
            )  # fmt: skip
            pairs = float(len(members))
            whole = {
                "loss": out.loss.detach(),
                "sft_loss": out.stats.get("sft_loss"),
            }  # of `total` pairs, of which these are some
            named = {"accuracy": "accuracy", "reward_margin": "margin"}
            named |= {f"rewards/{side}": f"{side}_reward" for side in ("chosen", "rejected")}
            found = {name: value * total / pairs for name, value in whole.items()}
            found |= {name: out.stats.get(key) for name, key in named.items()}
            found |= {"logprobs/chosen": chosen.detach().mean(), "logprobs/rejected": rejected.detach().mean()}
            for name, value in found.items():
                averages.value(name, value, pairs)
            return out.loss

        run(self.model, [(b.tokens, b.pack) for _, b in batches], last)
        return averages.pop(self.groups)

    def _batches(self, pairs: Sequence[Preference]) -> Iterator[tuple[list[int], MicroBatch]]:
        """This dp rank's pairs in micro-batches: which, and their chosen sides with their rejected ones after them."""
        sides = [p.prompt + p.chosen for p in pairs] + [p.prompt + p.rejected for p in pairs]
        sequences = Sequences(sides, [len(p.prompt) for p in pairs] * 2)
        longest = [len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs]
        for group in own_groups(longest, max(self.config.micro_batch_tokens // 2, 1), self.groups):
            members = sorted(group)
            yield members, micro_batch(sequences, members + [len(pairs) + m for m in members], self.device)

    def _of_sides(self, model: Decoder, batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs of the chosen and the rejected completions of a micro-batch."""
        tokens = token_logprobs(model, hidden[batch.at], batch.labels).logprobs
        chosen, rejected = sequence_logprobs(tokens, cu_seqlens=batch.cu_seqlens, average=self.average).chunk(2)
        return chosen, rejected

    def _reference_logprobs(self, batches: Sequence[tuple[list[int], MicroBatch]], pairs: int) -> Tensor | None:
        """(2, pairs), by side. From the policy's own micro-batches, so that at first both are the same to the bit."""
        if self.reference is None:
            return None
        out = torch.zeros(2, pairs, device=self.device)
        with torch.no_grad(), self.reference.model() as model:

            def last(i: int, hidden: Tensor) -> None:
                members, batch = batches[i]
                out[:, torch.tensor(members, device=self.device)] = torch.stack(self._of_sides(model, batch, hidden))

            run(model, [(b.tokens, b.pack) for _, b in batches], last)
        return out  # complete where it is used: in the last stage, for this dp rank's pairs

    def length(self, example: Preference) -> int:
        return 2 * len(example.prompt) + len(example.chosen) + len(example.rejected)

    def export(self, directory: Path) -> None:
        save_decoder(self.model, directory, tokenizer=self.tokenizer)
