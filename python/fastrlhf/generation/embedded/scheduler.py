"""Which tokens go through the model next: one of every running sequence, and as much of waiting prompts as fits."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from ...ops.paged_attention import BLOCK
from .blocks import BlockManager
from .sequence import Sequence


class Span(NamedTuple):
    """The tokens [first, end) of a sequence. `draws`: whether they reach its end, so that a token is drawn after them."""

    sequence: Sequence
    first: int
    end: int
    draws: bool


class Scheduler:
    """Sequences in order of arrival. When the cache is full the last comer makes room and is computed again later."""

    def __init__(self, blocks: BlockManager, max_sequences: int, max_batch_tokens: int) -> None:
        self.blocks, self.max_sequences, self.max_batch_tokens = blocks, max_sequences, max_batch_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def next(self) -> list[Span]:
        spans: list[Span] = []
        left = self.max_batch_tokens
        for sequence in list(self.running):
            if not left:
                break
            if not sequence.blocks:  # it made room for an earlier one
                continue
            end = min(len(sequence.tokens), sequence.cached + left)
            if self._make_room(sequence, end):
                spans.append(Span(sequence, sequence.cached, end, end == len(sequence.tokens)))
                left -= end - sequence.cached
        while self.waiting and left:
            sequence = self.waiting[0]
            if self.running and self._count() + 1 + sequence.siblings > self.max_sequences:
                break
            end = min(len(sequence.tokens), left)
            # its whole prompt and a block for each sample must fit, or it would be thrown out again at once
            if self.running and self._blocks_for(len(sequence.tokens)) + 1 + sequence.siblings > self.blocks.free:
                break
            self._grow(sequence, end)
            self.waiting.popleft()
            self.running.append(sequence)
            spans.append(Span(sequence, 0, end, end == len(sequence.tokens)))
            left -= end
        return spans

    def fork(self, parent: Sequence, child: Sequence) -> tuple[int, int] | None:
        """Give the child the parent's cache. Whole blocks are shared; returns (from, to) of the last one, which is copied
        if it is not full. None also where there is no room: the child then waits to be computed for itself."""
        full, rest = divmod(parent.cached, BLOCK)
        if rest and not self.blocks.free:
            self.waiting.appendleft(child)
            return None
        child.cached = parent.cached
        child.blocks = [self.blocks.share(b) for b in parent.blocks[:full]]
        self.running.append(child)
        if not rest:
            return None
        child.blocks.append(self.blocks.take())
        return parent.blocks[full], child.blocks[full]

    def finish(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.release(sequence.blocks)
        sequence.blocks = []

    @property
    def count(self) -> int:
        """Sequences under way or waiting."""
        return self._count() + sum(1 + s.siblings for s in self.waiting)

    def _count(self) -> int:
        return sum(1 + s.siblings for s in self.running)

    @staticmethod
    def _blocks_for(tokens: int) -> int:
        return -(-tokens // BLOCK)

    def _make_room(self, sequence: Sequence, end: int) -> bool:
        need = self._blocks_for(end) - len(sequence.blocks)
        while need > self.blocks.free:
            last = self.running[-1]
            self._preempt(last)
            if last is sequence:
                return False
        self._grow(sequence, end)
        return True

    def _grow(self, sequence: Sequence, end: int) -> None:
        while len(sequence.blocks) < self._blocks_for(end):
            sequence.blocks.append(self.blocks.take())

    def _preempt(self, sequence: Sequence) -> None:
        self.finish(sequence)
        sequence.cached = 0
        self.waiting.appendleft(sequence)
        self.preemptions += 1
