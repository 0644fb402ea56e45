"""Sequences of prompt and completion through a model, a few at a time, whole batches at once in effect."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import micro_batches_for, spread
from ..models import Decoder, Packed, ScalarModel, token_logprobs
from ..models.packed import offsets_of
from ..parallel import ParallelGroups
from .passes import assembled, run


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


def own_groups(lengths: Sequence[int], max_tokens: int, groups: ParallelGroups | None = None) -> list[list[int]]:
    """Which sequences go through the model together in this dp rank: its part of them, about the same number of tokens for
    each rank, in micro-batches of similar lengths of at most max_tokens, padding counted."""
    groups = groups or ParallelGroups()
    mine = spread(lengths, groups.dp.size)[groups.dp.rank]
    bins = micro_batches_for([lengths[i] for i in mine], max_tokens, groups.pp.size)
    return [[mine[i] for i in members] for members in bins]


def micro_batches(
    sequences: Sequences, members: Sequence[int], max_tokens: int, device: torch.device, groups: ParallelGroups | None = None
) -> Iterator[MicroBatch]:
    """Those of the members that are this dp rank's, as `own_groups` has them."""
    lengths = [len(sequences.tokens[m]) for m in members]
    for group in own_groups(lengths, max_tokens, groups):
        yield micro_batch(sequences, sorted(members[i] for i in group), device)


def micro_batch(sequences: Sequences, members: list[int], device: torch.device) -> MicroBatch:
    """These of the sequences, in this order."""
    tokens, pack = Packed.of([sequences.tokens[m] for m in members], device)
    whole = [len(sequences.tokens[m]) for m in members]
    prompts = torch.tensor([sequences.prompt_lengths[m] for m in members])
    counts = torch.tensor(whole) - prompts
    cu = offsets_of(counts.tolist())
    within = torch.arange(int(cu[-1])) - torch.repeat_interleave(cu[:-1], counts)
    starts = offsets_of(whole)[:-1] + prompts - 1
    at = (torch.repeat_interleave(starts, counts) + within).to(device)
    rows = torch.repeat_interleave(sequences.offsets[torch.tensor(members)], counts) + within
    return MicroBatch(members, tokens, pack, at, tokens[at + 1], rows.to(device), cu.to(device))


def completion_logprobs(model: Decoder, sequences: Sequences, *, max_tokens: int, temperature: float = 1.0) -> Tensor:
    """log π of every completion token, packed, float32, without gradient. Collective over all processes, which all get it."""

    def of(batch: MicroBatch, hidden: Tensor) -> Tensor:
        return token_logprobs(model, hidden, batch.labels, temperature=temperature).logprobs

    return _of_tokens(model, sequences, max_tokens, of)


def completion_values(model: ScalarModel, sequences: Sequences, *, max_tokens: int) -> Tensor:
    """V of the state before every completion token, packed, float32, without gradient. Collective over all processes."""
    return _of_tokens(model.decoder, sequences, max_tokens, lambda batch, hidden: model.of_hidden(hidden))


def _of_tokens(model: Decoder, sequences: Sequences, max_tokens: int, of: Callable[[MicroBatch, Tensor], Tensor]) -> Tensor:
    device, groups = model.device, model.groups
    out = torch.zeros(int(sequences.offsets[-1]), device=device)
    batches = list(micro_batches(sequences, range(len(sequences)), max_tokens, device, groups))

    def last(i: int, hidden: Tensor) -> None:
        out[batches[i].rows] = of(batches[i], hidden[batches[i].at])

    with torch.no_grad():
        run(model, [(b.tokens, b.pack) for b in batches], last)
    return assembled(out, groups)


def last_token_scores(model: ScalarModel, tokens: Sequence[Sequence[int]], *, max_tokens: int) -> Tensor:
    """What a reward model says at the last token of each sequence, float32 (B), standardised, without gradient. Collective
    over all processes."""
    groups, device = model.decoder.groups, model.score.device
    out = torch.zeros(len(tokens), device=device)
    members = own_groups([len(t) for t in tokens], max_tokens, groups)
    inputs = [Packed.of([tokens[i] for i in group], device) for group in members]

    def last(i: int, hidden: Tensor) -> None:
        ends = hidden[inputs[i][1].cu_seqlens[1:] - 1]
        out[torch.tensor(members[i], device=device)] = model.standardized(model.of_hidden(ends))

    with torch.no_grad():
        run(model.decoder, inputs, last)
    return assembled(out, groups)
