"""Continuous batching on the trainer's own parameters.

A completion depends on its prompt, seed and weights alone, to the bit: attention is by the token, seeds are by the
sequence and position, and matrix products always have a multiple of `_ROWS` rows, because libraries choose another order
of additions for a few rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...models.checkpoint import load_weights
from ...models.decoder import Decoder
from ...ops import sample
from ...ops.paged_attention import BLOCK
from ...parallel import pipeline
from ...parallel.collectives import gather_last
from ...refit.live import parameters_of
from ...refit.session import Refit, Session
from ...refit.states import Weights
from ...refit.transports.alias import Alias
from ...seeds import GOLDEN, mix
from ..engine import Completion, Finished, GenerationStats, Sampling
from .blocks import BlockManager
from .cache import Cache, Paged
from .scheduler import Scheduler, Span
from .sequence import Sequence, Share, Work, given

_ROWS = 8
_STRIDE = GOLDEN - 2**64  # as int64


class EmbeddedEngine:
    """Generates with `model` in this process; it shares the parameters, so there is nothing to update after a step.

    Args:
        model: on any device. With tp or a pipeline every process of the model makes the same calls and gets the same
            completions; through a pipeline a token goes from stage to stage, one at work at a time.
        tokenizer: anything with decode(); only stop strings need it.
        max_sequences: how many are in the batch at once.
        max_batch_tokens: the most tokens through the model at once: longer prompts go in chunks.
        cache_tokens: positions the cache holds; None is max_sequences · the longest sequence of a call, at most 2 GiB.
        context: the longest sequence; None is the model's max_position_embeddings.
    """

    def __init__(
        self, model: Decoder, tokenizer: Any = None, *, max_sequences: int = 256, max_batch_tokens: int = 4096,
        cache_tokens: int | None = None, context: int | None = None,
    ) -> None:  # fmt: skip
        for name, value in (("max_sequences", max_sequences), ("max_batch_tokens", max_batch_tokens)):
            if value < 1:
                raise ValueError(f"{name}: expected >= 1, got {value}")
        if cache_tokens is not None and cache_tokens < BLOCK:
            raise ValueError(f"cache_tokens: expected >= {BLOCK}, got {cache_tokens}")
        self.model, self.tokenizer = model, tokenizer
        self.max_sequences, self.max_batch_tokens = max_sequences, max_batch_tokens
        self.cache_tokens = cache_tokens
        self.context = context or model.config.max_position_embeddings
        self.models = [model]  # by slot of `weights`
        self.weights = Weights(version=0)
        alias = Alias(self.weights, lambda: parameters_of(model), lambda: parameters_of(self.model))
        self.session = Session(alias, mode="keep", version=0)
        self.stats = GenerationStats()
        self._cache: Cache | None = None
        self._blocks = 0

    @property
    def version(self) -> int:
        """Of the weights."""
        return self.weights.version

    def update_weights(self, weights: Iterable[tuple[str, Tensor]] | None, version: int) -> Refit:
        """`weights` is None where they are the trainer's: only the version changes. A `stream` that is under way goes on with
        what there is now, and says so in `weight_spans`."""
        if weights is not None:
            try:
                load_weights(self.model, iter(weights))
            except BaseException as error:
                reason = f"loading version {version} failed half way: {error}"
                self.weights.spoil(reason)
                self.session.spoil(reason)
                raise
        return self.session.refit(version)

    def close(self) -> None:
        """There is nothing to end."""

    def generate(
        self, prompts: Seq[Seq[int]], sampling: Sampling, *, seeds: Seq[int] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:  # fmt: skip
        """n completions of each prompt; `progress` is told of each that ends."""
        out: list[list[Any]] = [[None] * sampling.n for _ in prompts]
        for done in self.stream(prompts, sampling, seeds=seeds):
            out[done.prompt][done.sample] = done.completion
            if progress is not None:
                progress(1)
        return out

    @torch.no_grad()
    def stream(
        self, prompts: Seq[Seq[int]], sampling: Sampling, *, seeds: Seq[int] | None = None, work: Work | None = None,
        at_once: int | None = None,
    ) -> Iterator[Finished]:  # fmt: skip
        """Completions as they end.

        Args:
            work: asked before each step, with how many sequences are under way, for more of them; None gives all at once.
            at_once: how many sequences `work` has under way at most, for which the cache is made; None is all.

        Raises:
            ValueError: an empty prompt, a token outside the vocabulary, a prompt and max_tokens that exceed the context or
                the cache, stop strings without a tokenizer, another number of seeds than prompts.
        """
        seeds = self._check(prompts, sampling, seeds)
        longest = max((len(p) for p in prompts), default=0) + sampling.max_tokens
        self._ensure_cache(longest, sampling.n * len(prompts) if at_once is None else at_once)
        assert self._cache is not None
        scheduler = Scheduler(BlockManager(self._blocks), self.max_sequences, self.max_batch_tokens)
        self.stats = GenerationStats()

        def add(share: Share) -> None:
            seed = mix(seeds[share.prompt], share.first)
            tokens = list(prompts[share.prompt])
            scheduler.add(Sequence(share.prompt, share.first, tokens, seed, sampling, share.samples - 1))
            self.stats.prompt_tokens += len(tokens)

        work = work or given([Share(i, 0, sampling.n) for i in range(len(prompts))])
        lease = self.weights.acquire()
        training = self.model.training
        try:
            while not lease.aborted:
                self.model = self.models[lease.slot]
                self.model.eval()
                for share in work(scheduler.count):
                    add(share)
                if not (spans := scheduler.next()):
                    break
                yield from self._step(scheduler, spans, seeds, lease.version)
                lease = self.weights.step(lease)
            yield from self._cut_off(scheduler)
        finally:
            self.weights.release(lease)
            self.model.train(training)
            self.stats.preemptions = scheduler.preemptions

    @staticmethod
    def _cut_off(scheduler: Scheduler) -> Iterator[Finished]:
        """What is still running or waiting, as it is."""
        for sequence in [*scheduler.running, *scheduler.waiting]:
            yield Finished(sequence.prompt, sequence.sample, sequence.completed("abort"))
            for i in range(sequence.sample + 1, sequence.sample + sequence.siblings + 1):
                yield Finished(sequence.prompt, i, Completion([], [], "abort"))

    def _step(self, scheduler: Scheduler, spans: list[Span], seeds: Seq[int], version: int) -> list[Finished]:
        assert self._cache is not None
        hidden = self._forward(spans)
        self.stats.steps += 1
        drawing: list[Sequence] = []
        rows: list[int] = []
        copies: list[tuple[int, int]] = []
        at = -1
        for span in spans:
            sequence = span.sequence
            at += span.end - span.first
            sequence.cached = span.end
            if not span.draws:
                continue
            drawing.append(sequence)
            rows.append(at)
            for i in range(sequence.sample + 1, sequence.sample + sequence.siblings + 1):
                child = Sequence(sequence.prompt, i, list(sequence.tokens), mix(seeds[sequence.prompt], i), sequence.sampling)
                copy = scheduler.fork(sequence, child)
                if copy is not None:
                    copies.append(copy)
                if child.blocks:
                    drawing.append(child)
                    rows.append(at)
            sequence.siblings = 0
        if copies:
            self._cache.copy(copies)
        if not drawing:
            return []
        tokens, logprobs = self._draw(hidden, drawing, rows)
        done = []
        for sequence, token, logprob in zip(drawing, tokens, logprobs, strict=True):
            sequence.draw(token, logprob, version)
            reason = self._ends(sequence, token)
            if reason:
                scheduler.finish(sequence)
                done.append(Finished(sequence.prompt, sequence.sample, sequence.completed(reason)))
        self.stats.completion_tokens += len(drawing)
        return done

    def _forward(self, spans: list[Span]) -> Tensor:
        assert self._cache is not None
        tokens: list[int] = []
        positions: list[int] = []
        sequences: list[int] = []
        for row, span in enumerate(spans):
            if span.end - span.first == 1:
                tokens.append(span.sequence.tokens[span.first])
                positions.append(span.first)
                sequences.append(row)
            else:
                tokens += span.sequence.tokens[span.first : span.end]
                positions += range(span.first, span.end)
                sequences += [row] * (span.end - span.first)
        width = max(len(s.sequence.blocks) for s in spans)
        table = [s.sequence.blocks + [0] * (width - len(s.sequence.blocks)) for s in spans]
        self.stats.forward_tokens += len(tokens)
        longest = max(positions) + 1
        device = self.model.device
        context = Paged(
            self._cache, torch.tensor(positions, device=device), torch.tensor(sequences, device=device),
            torch.tensor(table, dtype=torch.int32, device=device), longest,
        )  # fmt: skip
        tokens += [0] * (-len(tokens) % _ROWS)
        with self.model.all_rows():
            return self._through(torch.tensor(tokens, device=device), context)

    def _through(self, tokens: Tensor, context: Paged) -> Tensor:
        """The hidden states; in a pipeline its last stage's, of which the others know nothing."""
        model = self.model
        if model.stages.count == 1:
            return model(tokens, context)
        made = tokens.new_empty(0)

        def empty(_: int) -> Tensor:
            return torch.empty(tokens.shape[0], model.config.hidden_size, dtype=model.dtype, device=tokens.device)

        def last(_: int, hidden: Tensor) -> None:
            nonlocal made
            made = hidden

        pipeline.run(
            model.groups, model.stages.interleave, 1, empty=empty,
            forward=lambda chunk, _, rows: model.stage(chunk, tokens if rows is None else rows, context),
            last=last, backward=False,
        )  # fmt: skip
        return made

    def _draw(self, hidden: Tensor, drawing: list[Sequence], rows: list[int]) -> tuple[list[int], list[float]]:
        pp = self.model.groups.pp
        if pp.size == 1:
            tokens, logprobs = self._drawn(hidden, drawing, rows)
            return tokens.tolist(), logprobs.tolist()
        told = torch.empty(2, len(drawing), dtype=torch.float64, device=self.model.device)  # holds token ids exactly
        if pp.last:
            told = torch.stack([t.double() for t in self._drawn(hidden, drawing, rows)])
        dist.broadcast(told, src=pp.ranks[-1], group=pp.group)
        return told[0].long().tolist(), told[1].tolist()

    def _drawn(self, hidden: Tensor, drawing: list[Sequence], rows: list[int]) -> tuple[Tensor, Tensor]:
        count = len(drawing)
        distinct = sorted(set(rows))
        at = {row: i for i, row in enumerate(distinct)}
        wanted = distinct + [0] * (-len(distinct) % _ROWS)
        logits = gather_last(self.model.logits(hidden[torch.tensor(wanted, device=hidden.device)]), self.model.groups.tp)
        if len(distinct) < count:
            logits = logits[torch.tensor([at[r] for r in rows], device=hidden.device)]
        logits = logits[:count]
        base = torch.tensor([s.seed for s in drawing], device=hidden.device)
        drawn = torch.tensor([s.drawn for s in drawing], device=hidden.device)
        options = drawing[0].sampling
        out = sample(
            logits, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, min_p=options.min_p,
            seed=base + drawn * _STRIDE,
        )  # fmt: skip
        assert out.logprobs is not None
        return out.tokens, out.logprobs

    def _ends(self, sequence: Sequence, token: int) -> str:
        sampling = sequence.sampling
        if token in sampling.stop_tokens:
            return "stop"
        if sampling.stop:
            tail = sequence.completion[-max(len(s.encode()) for s in sampling.stop) - 1 :]
            text = self.tokenizer.decode(tail)
            if any(s in text for s in sampling.stop):
                return "stop"
        return "length" if sequence.drawn >= sampling.max_tokens else ""

    def _ensure_cache(self, longest: int, sequences: int) -> None:
        wanted = self.cache_tokens
        if wanted is None:
            heads, dim = self.model.kv_shape
            per_token = len(self.model.layers) * heads * (dim + -(-dim // 16) * 16) * self.model.dtype.itemsize
            wanted = min(min(self.max_sequences, sequences) * (longest + BLOCK), 2**31 // per_token)
        blocks = max(wanted, longest + BLOCK) // BLOCK if self.cache_tokens is None else wanted // BLOCK
        if longest > blocks * BLOCK:
            raise ValueError(f"cache_tokens: a sequence of {longest} does not fit in {blocks * BLOCK}")
        if self._cache is None or blocks > self._blocks:
            self._cache, self._blocks = None, 0  # before the new one is there
            self._cache, self._blocks = Cache(self.model, blocks), blocks

    def _check(self, prompts: Seq[Seq[int]], sampling: Sampling, seeds: Seq[int] | None) -> Seq[int]:
        vocab = self.model.config.vocab_size
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompts: prompt {i} is empty")
            if len(prompt) + sampling.max_tokens > self.context:
                raise ValueError(
                    f"prompts: prompt {i} has {len(prompt)} tokens, which with max_tokens {sampling.max_tokens} exceed the "
                    f"context of {self.context}"
                )
            if min(prompt) < 0 or max(prompt) >= vocab:
                raise ValueError(f"prompts: prompt {i} holds a token outside the vocabulary of {vocab}")
        if sampling.stop and self.tokenizer is None:
            raise ValueError("stop: strings need an engine with a tokenizer")
        if seeds is None:
            seeds = torch.randint(2**62, (len(prompts),), dtype=torch.int64).tolist()
        if len(seeds) != len(prompts):
            raise ValueError(f"seeds: expected {len(prompts)}, one for each prompt, got {len(seeds)}")
        return seeds
