"""Supervised fine-tuning: the negative log-likelihood of answers, Σ -log π / number of answer tokens of the whole batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..config import REQUIRED, option, section
from ..data import Conversation, ConversationDataset, ConversationStream, open_rows
from ..models import Decoder, Packed, save_decoder, token_logprobs
from ..training.averages import Averages
from ..training.batches import own_groups
from ..training.layout import Layout, ParallelConfig
from ..training.loop import RunConfig
from ..training.metrics import Value
from ..training.optim import OptimizerConfig
from ..training.passes import run
from ..training.policy import ModelConfig, load_matching_tokenizer, load_model
from ..training.progress import Progress
from ..training.supervised import Supervised


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
    """Supervised fine-tuning."""

    run: RunConfig = section(RunConfig, "Where the run lives.")
    parallel: ParallelConfig = section(ParallelConfig, "How it is spread over processes.")
    model: ModelConfig = section(ModelConfig, "The model to start from.")
    data: ConversationConfig = section(ConversationConfig, "Conversations.")
    steps: int = option(100, "Optimizer steps.", low=1)
    batch_size: int = option(64, "Conversations of a step.", low=1)
    micro_batch_tokens: int = option(8192, "Tokens through the model at once, padding counted; changes no result.", low=1)
    optimizer: OptimizerConfig = section(OptimizerConfig, "How weights move.", lr=3e-5, schedule="cosine", warmup_steps=10)


class SFT(Supervised[Conversation]):
    name = "sft"
    model: Decoder

    def __init__(self, config: SFTConfig) -> None:
        self.config = config
        parallel = Layout.create(config.parallel)
        model, self.device = load_model(config.model, config.run.seed, parallel)
        self.tokenizer = load_matching_tokenizer(config.model.path, model)
        context = model.config.max_position_embeddings
        data = config.data
        held_out = None if data.held_out is None else self._dataset(data.held_out, context, data.held_out_limit)
        stream = ConversationStream(self._dataset(data.path, context), config.run.seed)
        super().__init__(
            model, stream, held_out, config.optimizer, steps=config.steps, batch_size=config.batch_size,
            groups=parallel.groups,
        )  # fmt: skip

    def _dataset(self, path: str, context: int, limit: int | None = None) -> ConversationDataset:
        data = self.config.data
        return ConversationDataset(
            open_rows(path.split(","), limit=limit), self.tokenizer, max_tokens=min(data.max_tokens, context),
            prompt_field=data.prompt_field, completion_field=data.completion_field, prompt_template=data.prompt_template,
            completion_template=data.completion_template, overlong=data.overlong, invalid=data.invalid,
        )  # fmt: skip

    def accumulate(self, examples: Sequence[Conversation]) -> dict[str, float]:
        averages = Averages()
        answers = self.weight(examples)
        members = own_groups([len(c.tokens) for c in examples], self.config.micro_batch_tokens, self.groups)
        batches = [[examples[i] for i in sorted(group)] for group in members]
        inputs = [Packed.of([c.tokens for c in chosen], self.device) for chosen in batches]

        def last(i: int, hidden: Tensor) -> Tensor:
            tokens = inputs[i][0]
            wanted = torch.tensor([m for c in batches[i] for m in c.loss_mask], device=self.device).nonzero().squeeze(1)
            out = token_logprobs(self.model, hidden[wanted - 1], tokens[wanted])
            averages.value("loss", -out.logprobs.detach().mean(), float(wanted.shape[0]))
            return -out.logprobs.sum() / answers

        run(self.model, inputs, last)
        return averages.pop(self.groups) | {"answer_tokens": answers}

    def length(self, example: Conversation) -> int:
        return len(example.tokens)

    def weight(self, examples: Sequence[Conversation]) -> float:
        """Answer tokens."""
        return float(sum(sum(c.loss_mask) for c in examples))

    def evaluate(self, progress: Progress) -> dict[str, Value]:
        found = super().evaluate(progress)
        if not found:
            return {}
        loss = float(found["loss"])  # type: ignore[arg-type]
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "examples": found["examples"]}

    def export(self, directory: Path) -> None:
        save_decoder(self.model, directory, tokenizer=self.tokenizer)
