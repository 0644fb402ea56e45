"""Completions drawn by all replicas of a policy together, and given to every process.

A completion depends on its prompt, seed and weights alone, so which replica draws it changes nothing: the replicas may take
sequences from one queue as they come free, and a run is reproducible all the same.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...parallel import ParallelGroups
from ...parallel.groups import Axis
from ...refit.session import Refit
from ..engine import Completion, Engine, Finished, GenerationStats, Sampling
from .engine import EmbeddedEngine
from .reshard import Resharded
from .sequence import Share, Work, given

_QUEUES = itertools.count()  # names of the queues of a process's life; all processes make the same ones
HEAD_START = 0.5
"""The share of the sequences that is dealt out before the rest is taken one by one."""


class Expected:
    """How long completions are expected to be: as the last ones of the same prompt were, else as the mean of all so far."""

    def __init__(self) -> None:
        self._last: dict[int, float] = {}  # by the prompt's hash: prompts would outgrow what they help
        self._mean = 0.0

    def __call__(self, prompt: Sequence[int]) -> float:
        return self._last.get(hash(tuple(prompt)), self._mean)

    def learn(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Completion]]) -> None:
        for prompt, drawn in zip(prompts, completions, strict=True):
            self._last[hash(tuple(prompt))] = sum(len(c.tokens) for c in drawn) / len(drawn)
        self._mean = sum(self._last.values()) / max(len(self._last), 1)


def longest_first(prompts: Sequence[Sequence[int]], n: int, expected: Callable[[Sequence[int]], float]) -> list[Share]:
    """Every sample of every prompt, those expected to be the longest first; of equals the longest prompt."""
    order = sorted(range(len(prompts)), key=lambda i: (-expected(prompts[i]), -len(prompts[i]), i))
    return [Share(i, sample, 1) for i in order for sample in range(n)]


def together(shares: Iterable[Share]) -> list[Share]:
    """Neighbouring samples of a prompt as one share: the prompt then goes through the model once."""
    out: list[Share] = []
    for share in shares:
        if out and out[-1].prompt == share.prompt and out[-1].first + out[-1].samples == share.first:
            out[-1] = Share(share.prompt, out[-1].first, out[-1].samples + share.samples)
        else:
            out.append(share)
    return out


class Queue:
    """`shares` for the replicas: the first half is dealt out like cards, so that each begins with as many long ones; of
    the rest each takes the next whenever one of its own has ended. Every process of a replica gets the same.

    Args:
        within: the axes over which one replica is spread.
        take: n -> the place of the first of the next n in one count of all replicas.
    """

    def __init__(
        self, shares: Sequence[Share], within: Sequence[Axis], replica: int, replicas: int, most: int,
        take: Callable[[int], int],
    ) -> None:  # fmt: skip
        self.within, self._take = within, take
        dealt = min(most, max(1, int(len(shares) * HEAD_START / replicas))) * replicas
        self._first: list[Share] | None = list(shares[:dealt][replica::replicas])
        self._rest = shares[dealt:]
        self.slots = max(1, len(self._first))
        self._over = not self._rest

    def __call__(self, running: int) -> list[Share]:
        if self._first is not None:
            first, self._first = self._first, None
            return together(first)
        free = self.slots - running
        if self._over or free <= 0:
            return []
        at = self._next(free)
        self._over = at + free >= len(self._rest)
        return together(self._rest[at : at + free])

    def _next(self, count: int) -> int:
        """Taken once for the replica, by its first process."""
        at = self._take(count) if all(axis.first for axis in self.within) else 0
        for axis in self.within:
            if axis.size > 1:
                told = torch.tensor([at], dtype=torch.int64, device=_device(axis.group))
                dist.broadcast(told, src=axis.ranks[0], group=axis.group)
                at = int(told)
        return at


class Fleet:
    """An `Engine` whose calls are collective over all processes: each replica draws its part, every process gets all.

    Args:
        engine: of this process, over `resharded.decoder`; where there are several processes an `EmbeddedEngine`.
        balance: take sequences from one queue; else each replica draws as many prompts.
    """

    def __init__(self, engine: Engine, groups: ParallelGroups, resharded: Resharded, *, balance: bool = True) -> None:
        self.engine, self.groups, self.resharded, self.balance = engine, groups, resharded, balance
        self.stats = GenerationStats()
        self.idle = 0.0
        """Of the last call: the mean share of its time that a replica waited for the slowest."""
        self.expected = Expected()

    def update_weights(self, weights: Iterable[tuple[str, Tensor]] | None, version: int) -> Refit:
        return self.engine.update_weights(weights, version)

    def close(self) -> None:
        self.engine.close()

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seeds: Sequence[int] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:  # fmt: skip
        """n completions of each prompt, the same in every process. `seeds` must be given where there are several."""
        if self.groups.world.size == 1:
            out = self.engine.generate(prompts, sampling, seeds=seeds, progress=progress)
            self.stats = self.engine.stats
            return out
        if seeds is None:
            raise ValueError("seeds: must be given, the same in every process")
        assert isinstance(self.engine, EmbeddedEngine)
        with self.resharded.gathered():
            self._barrier()
            begun = time.perf_counter()
            found = {}
            work = self._work(prompts, sampling.n)
            for done in self.engine.stream(prompts, sampling, seeds=seeds, work=work):
                found[done.prompt, done.sample] = done.completion
                if progress is not None:
                    progress(1)
            seconds = time.perf_counter() - begun
        return self._everyones(found, seconds, prompts, sampling.n)

    def stream(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seeds: Sequence[int] | None = None
    ) -> Iterator[Finished]:
        for i, drawn in enumerate(self.generate(prompts, sampling, seeds=seeds)):
            yield from (Finished(i, sample, completion) for sample, completion in enumerate(drawn))

    def _work(self, prompts: Sequence[Sequence[int]], n: int) -> Work:
        replica, replicas = self.resharded.replicas.rank, self.resharded.replicas.size
        if not self.balance or replicas == 1:
            return given(Share(i, 0, n) for i in range(replica, len(prompts), replicas))
        assert isinstance(self.engine, EmbeddedEngine)
        store = dist.distributed_c10d.PrefixStore("fastrlhf/queue", dist.distributed_c10d._get_default_store())
        key = str(next(_QUEUES))
        shares = longest_first(prompts, n, self.expected)
        staged = self.resharded.decoder.groups.pp
        within = (staged, self.groups.tp)
        return Queue(shares, within, replica, replicas, self.engine.max_sequences, lambda count: store.add(key, count) - count)

    def _everyones(
        self, found: dict[tuple[int, int], Completion], seconds: float, prompts: Sequence[Sequence[int]], n: int
    ) -> list[list[Completion]]:
        axis = self.resharded.replicas
        parts: list[Any] = [(found, seconds, self.engine.stats)]
        if axis.size > 1:
            parts = [None] * axis.size
            dist.all_gather_object(parts, (found, seconds, self.engine.stats), group=axis.group)
        every: dict[tuple[int, int], Completion] = {}
        self.stats = GenerationStats()
        for drawn, _, stats in parts:
            every |= drawn
            for name, value in vars(stats).items():
                setattr(self.stats, name, getattr(self.stats, name) + value)
        slowest = max(took for _, took, _ in parts)
        self.idle = 1 - sum(took for _, took, _ in parts) / (slowest * len(parts)) if slowest else 0.0
        out = [[every[i, sample] for sample in range(n)] for i in range(len(prompts))]
        self.expected.learn(prompts, out)
        return out

    def _barrier(self) -> None:
        axis = self.groups.replicas
        if axis.size > 1:
            dist.barrier(axis.group)


def _device(group: Any) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else torch.device("cpu")
