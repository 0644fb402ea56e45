"""Completions drawn by all replicas of a policy together, and given to every process.

A completion depends on its prompt, seed and weights alone, so which replica draws it changes nothing: the replicas may take
sequences from one queue as they come free, and a run is reproducible all the same.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ...parallel import ParallelGroups
from ...refit.session import Refit
from ..engine import Completion, Engine, Finished, GenerationStats, Sampling
from .engine import EmbeddedEngine
from .queue import Board, Expected, Queue
from .reshard import Resharded
from .sequence import Share, Work, given

_QUEUES = itertools.count()  # names of the queues of a process's life; all processes make the same ones


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
            at_once = -(-len(prompts) // self.resharded.replicas.size) * sampling.n
            if isinstance(work, Queue):
                at_once = work.slots
            for done in self.engine.stream(prompts, sampling, seeds=seeds, work=work, at_once=at_once):
                found[done.prompt, done.sample] = done.completion
                if isinstance(work, Queue):
                    work.finished(done.prompt, done.sample, len(done.completion.tokens))
                if progress is not None:
                    progress(1)
            seconds = time.perf_counter() - begun
        out = self._everyones(found, seconds, prompts, sampling.n)
        if isinstance(work, Queue):
            work.close()
        return out

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
        store = dist.distributed_c10d.PrefixStore(f"fastrlhf/queue/{next(_QUEUES)}", dist.distributed_c10d._get_default_store())
        expected = [self.expected(prompt) for prompt in prompts]
        within = (self.resharded.decoder.groups.pp, self.groups.tp)
        return Queue(expected, n, within, self.engine.max_sequences, Board(store, replica, replicas))

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
