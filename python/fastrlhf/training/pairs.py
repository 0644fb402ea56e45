"""Preference pairs of a run: where they come from, and what is held out. Reward models and DPO share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import REQUIRED, option
from ..data import ExampleStream, Preference, PreferenceDataset, PreferenceStream, Rows, open_rows, split
from ..data.tokenizer import Tokenizer
from ..errors import ConfigError


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


def open_pairs(
    config: PreferenceConfig, tokenizer: Tokenizer, context: int, seed: int
) -> tuple[PreferenceStream, PreferenceDataset | None]:
    """The pairs to train on, in their order, and those to evaluate on.

    Args:
        context: the most tokens that the model takes.

    Raises:
        ConfigError: both ways of holding out at once.
    """

    def dataset(rows: Rows) -> PreferenceDataset:
        return PreferenceDataset(
            rows, tokenizer, max_tokens=min(config.max_tokens, context), prompt_field=config.prompt_field,
            prompt_template=config.prompt_template, margin_field=config.margin_field, overlong=config.overlong,
            invalid=config.invalid,
        )  # fmt: skip

    train, rest = _rows(config, seed)
    return PreferenceStream(dataset(train), seed), None if rest is None else dataset(rest)


def margins_of(pairs: Sequence[Preference], stream: ExampleStream[Preference], loss: str) -> Tensor:
    """By how much each pair's chosen side is better, float32 (B).

    Raises:
        ConfigError: a row that does not say.
    """
    for pair in pairs:
        if pair.margin is None:
            where = stream.dataset.rows.name
            raise ConfigError(f"loss: {loss} needs a margin with every pair; row {pair.index} of {where} has none")
    return torch.tensor([pair.margin for pair in pairs], dtype=torch.float32)


def _rows(config: PreferenceConfig, seed: int) -> tuple[Rows, Rows | None]:
    rows = open_rows(config.path.split(","))
    if config.held_out is not None and config.held_out_share:
        raise ConfigError("data.held_out_share: expected 0 beside data.held_out; one of them says what is held out")
    if config.held_out is not None:
        return rows, open_rows(config.held_out.split(","), limit=config.held_out_limit)
    if not config.held_out_share:
        return rows, None
    return split(rows, config.held_out_share, seed)
