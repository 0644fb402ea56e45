"""Sequences of prompt and completion through a model, a few at a time, whole batches at once in effect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import batches_by_tokens
from ..models import Decoder, Packed, ScalarModel, token_logprobs
from ..models.packed import offsets_of


@dataclass(frozen=True)
class Sequences:
    """Tokens of prompts and completions. Per-token results are packed over the completions' tokens, in order; completion
    i has the rows [offsets[i], offsets[i + 1])."""

    tokens: list[list[int]]
    prompt_lengths: list[int]

    @property
    def completion_lengths(self) -> list[int]:
        return [len(t) - p for t, p in zip(self.tokens, self.prompt_lengths, strict=True)]

    @property
    def offsets(self) -> Tensor:
        return offsets_of(self.completion_lengths)

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class MicroBatch:
    """Some of the sequences as one pack, with where their completions' tokens are predicted.

    `members`: which sequences. `at` (n): rows of the pack whose hidden states predict `labels` (n). `rows` (n): where these
    tokens are in the whole batch's packed results. `cu_seqlens` (members + 1) cuts the n by sequence.
    """

    members: list[int]
    tokens: Tensor
    pack: Packed
    at: Tensor
    labels: Tensor
    rows: Tensor
    cu_seqlens: Tensor


def micro_batches(sequences: Sequences, members: Sequence[int], max_tokens: int, device: torch.device) -> Iterator[MicroBatch]:
    """The members in packs of similar lengths of at most max_tokens, padding counted."""
    offsets = sequences.offsets
    lengths = [len(sequences.tokens[m]) for m in members]
    for group in batches_by_tokens(lengths, max_tokens):
        chosen = sorted(members[i] for i in group)
        tokens, pack = Packed.of([sequences.tokens[m] for m in chosen], device)
        whole = [len(sequences.tokens[m]) for m in chosen]
        prompts = torch.tensor([sequences.prompt_lengths[m] for m in chosen])
        counts = torch.tensor(whole) - prompts
        cu = offsets_of(counts.tolist())
        within = torch.arange(int(cu[-1])) - torch.repeat_interleave(cu[:-1], counts)
        starts = offsets_of(whole)[:-1] + prompts - 1
        at = (torch.repeat_interleave(starts, counts) + within).to(device)
        rows = torch.repeat_interleave(offsets[torch.tensor(chosen)], counts) + within
        yield MicroBatch(chosen, tokens, pack, at, tokens[at + 1], rows.to(device), cu.to(device))


def completion_logprobs(model: Decoder, sequences: Sequences, *, max_tokens: int, temperature: float = 1.0) -> Tensor:
    """log π of every completion token, packed, float32, without gradient."""
    device = model.device
    out = torch.empty(int(sequences.offsets[-1]), device=device)
    with torch.no_grad():
        for batch in micro_batches(sequences, range(len(sequences)), max_tokens, device):
            hidden = model(batch.tokens, batch.pack)[batch.at]
            out[batch.rows] = token_logprobs(model, hidden, batch.labels, temperature=temperature).logprobs
    return out


def completion_values(model: ScalarModel, sequences: Sequences, *, max_tokens: int) -> Tensor:
    """V of the state before every completion token, packed, float32, without gradient."""
    device = model.score.device
    out = torch.empty(int(sequences.offsets[-1]), device=device)
    with torch.no_grad():
        for batch in micro_batches(sequences, range(len(sequences)), max_tokens, device):
            out[batch.rows] = model(batch.tokens, batch.pack)[batch.at]
    return out


def last_token_scores(model: ScalarModel, tokens: Sequence[Sequence[int]], *, max_tokens: int) -> Tensor:
    """What a reward model says at the last token of each sequence, float32 (B), standardised, without gradient."""
    out = torch.empty(len(tokens), device=model.score.device)
    with torch.no_grad():
        for group in batches_by_tokens([len(t) for t in tokens], max_tokens):
            flat, pack = Packed.of([tokens[i] for i in group], model.score.device)
            hidden = model.decoder(flat, pack)[pack.cu_seqlens[1:] - 1]
            out[torch.tensor(group, device=out.device)] = model.standardized(model.of_hidden(hidden))
    return out
