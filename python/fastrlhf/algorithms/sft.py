"""Supervised fine-tuning: the negative log-likelihood of answers, Σ -log π / number of answer tokens of the whole batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import REQUIRED, option, section
from ..data import Conversation, ConversationDataset, ConversationStream, batches_by_tokens, open_rows
from ..errors import ConfigError
from ..models import Packed, save_decoder, token_logprobs
from ..models.checkpoint import trainable
from ..training.averages import Averages
from ..training.loop import RunConfig
from ..training.metrics import Value
from ..training.optim import Optimizer, OptimizerConfig
from ..training.policy import ModelConfig, load_matching_tokenizer, load_model
from ..training.progress import Progress
from ..training.state import load_into
from ..training.timers import Timers


@dataclass
class ConversationConfig:
    """Prompts and answers: JSONL (.gz), Parquet, a saved Hugging Face dataset or hf:name."""

    path: str = option(REQUIRED, "File, several separated by commas, or dataset.")
    held_out: str | None = option(None, "The same, to evaluate on; null evaluates nothing.")
    held_out_limit: int | None = option(None, "Evaluate on the first so many.", low=1)
    prompt_field: str = option("prompt", "Field with the prompt.")
    completion_field: str = option("completion", "Field with the answer.")
    prompt_template: str | None = option(None, 'Builds the prompt from fields instead, as "Question: {question}\\nAnswer:".')
    completion_template: str | None = option(None, 'Builds the answer, as " {answer}".')
    max_tokens: int = option(1024, "Of prompt and answer; longer ones are handled as `overlong` says.", low=1)
    overlong: str = option("skip", "skip counts them, error stops, truncate cuts.", choices=("skip", "error", "truncate"))
    invalid: str = option("error", "What to do with an empty prompt or answer.", choices=("error", "skip"))


@dataclass
class SFTConfig:
    """fastrlhf train sft"""

    run: RunConfig = section(RunConfig, "Where the run lives.")
    model: ModelConfig = section(ModelConfig, "The model to start from.")
    data: ConversationConfig = section(ConversationConfig, "Conversations.")
    steps: int = option(100, "Optimizer steps.", low=1)
    batch_size: int = option(64, "Conversations of a step.", low=1)
    micro_batch_tokens: int = option(8192, "Tokens through the model at once, padding counted; changes no result.", low=1)
    optimizer: OptimizerConfig = section(OptimizerConfig, "How weights move.", lr=3e-5, schedule="cosine", warmup_steps=10)


class SFT:
    name = "sft"

    def __init__(self, config: SFTConfig) -> None:
        self.config, self.steps = config, config.steps
        self.timers = Timers(torch.cuda.synchronize if torch.cuda.is_available() else None)
        self.model, self.device, _ = load_model(config.model, config.run.seed)
        self.tokenizer = load_matching_tokenizer(config.model.path, self.model)
        self.stream = ConversationStream(self._dataset(config.data.path), config.run.seed)
        held_out = config.data.held_out
        self.held_out = None if held_out is None else self._dataset(held_out, config.data.held_out_limit)
        self.optimizer = Optimizer(trainable(self.model), config.optimizer, config.steps)
        self.touched = False

    def _dataset(self, path: str, limit: int | None = None) -> ConversationDataset:
        data = self.config.data
        return ConversationDataset(
            open_rows(path.split(","), limit=limit), self.tokenizer,
            max_tokens=min(data.max_tokens, self.model.config.max_position_embeddings), prompt_field=data.prompt_field,
            completion_field=data.completion_field, prompt_template=data.prompt_template,
            completion_template=data.completion_template, overlong=data.overlong, invalid=data.invalid,
        )  # fmt: skip

    def step(self, step: int, progress: Progress) -> Mapping[str, Value]:
        self.touched = False
        conversations = self.stream.next(self.config.batch_size)
        count = sum(len(c.tokens) for c in conversations)
        with self.timers("train", count), progress.phase("train"):
            averages = self.accumulate(conversations)
            metrics = averages.pop() | {"answer_tokens": float(sum(sum(c.loss_mask) for c in conversations))}
            taken = self.optimizer.step("sft", torch.tensor(metrics["loss"]))
            self.touched = True
        data = {"epoch": self.stream.epoch, "skipped": self.stream.skipped, "invalid": self.stream.invalid}
        return metrics | taken | {f"data/{name}": float(value) for name, value in data.items()}

    def accumulate(self, conversations: list[Conversation]) -> Averages:
        """The gradient of the batch's loss, in as many micro-batches as it takes; without one where none is wanted."""
        averages = Averages()
        answers = sum(sum(c.loss_mask) for c in conversations)
        for group in batches_by_tokens([len(c.tokens) for c in conversations], self.config.micro_batch_tokens):
            chosen = [conversations[i] for i in sorted(group)]
            tokens, pack = Packed.of([c.tokens for c in chosen], self.device)
            wanted = torch.tensor([m for c in chosen for m in c.loss_mask], device=self.device).nonzero().squeeze(1)
            hidden = self.model(tokens, pack)[wanted - 1]
            out = token_logprobs(self.model, hidden, tokens[wanted])
            loss = -out.logprobs.sum() / answers
            if torch.is_grad_enabled():
                loss.backward()
            averages.value("loss", -out.logprobs.detach().mean(), float(wanted.shape[0]))
        return averages

    @torch.no_grad()
    def evaluate(self, progress: Progress) -> dict[str, Value]:
        """The loss of held-out conversations, by answer token."""
        if self.held_out is None:
            return {}
        found = [c for i in range(len(self.held_out)) if (c := self.held_out[i]) is not None]
        if not found:
            raise ConfigError(f"data.held_out: no conversation in it has at most {self.held_out.max_tokens} tokens")
        averages = Averages()
        for i in range(0, len(found), self.config.batch_size):
            part = found[i : i + self.config.batch_size]
            weight = float(sum(sum(c.loss_mask) for c in part))
            averages.value("loss", self.accumulate(part).pop()["loss"], weight)
        loss = averages.pop()["loss"]
        return {"loss": loss, "perplexity": float(torch.exp(torch.tensor(loss)))}

    def samples(self) -> list[dict[str, Any]]:
        return []

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {"model": dict(trainable(self.model)), "optimizer": self.optimizer.save()[0]}

    def state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.save()[1], "data": self.stream.state_dict()}

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        load_into(trainable(self.model), tensors["model"], "model")
        self.optimizer.load(tensors["optimizer"], state["optimizer"])
        self.stream.load_state_dict(state["data"])

    def export(self, directory: Path) -> None:
        save_decoder(self.model, directory, tokenizer=self.tokenizer)
