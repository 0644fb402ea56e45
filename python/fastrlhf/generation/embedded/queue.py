"""Which replica draws which sample: one queue that all replicas of a policy take from as they come free.

Prompts that were drawn from before are expected to be as long as they were then, and the long ones come first. Of the others
one sample comes first; what these turn out to be, done or still under way, puts the rest of them in order. Where all samples
can be under way at once there is nothing to wait for, and they are dealt out beforehand.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ...parallel.groups import Axis
from ..engine import Completion
from .sequence import Share


class Expected:
    """How long completions are expected to be: as the last ones of the same prompt were, if it was ever drawn from."""

    def __init__(self) -> None:
        self._last: dict[int, float] = {}  # by the prompt's hash: prompts would outgrow what they help

    def __call__(self, prompt: Sequence[int]) -> float | None:
        return self._last.get(hash(tuple(prompt)))

    def learn(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Completion]]) -> None:
        for prompt, drawn in zip(prompts, completions, strict=True):
            self._last[hash(tuple(prompt))] = sum(len(c.tokens) for c in drawn) / len(drawn)


def together(shares: Iterable[Share]) -> list[Share]:
    """Neighbouring samples of a prompt as one share: the prompt then goes through the model once."""
    out: list[Share] = []
    for share in shares:
        if out and out[-1].prompt == share.prompt and out[-1].first + out[-1].samples == share.first:
            out[-1] = Share(share.prompt, out[-1].first, out[-1].samples + share.samples)
        else:
            out.append(share)
    return out


def dealt(expected: Sequence[float | None], n: int, replicas: int) -> list[list[Share]]:
    """Every sample to a replica, as many to each as to any other: prompt by prompt, the long ones first, to the replica that
    has the least to draw. A prompt's samples stay together as far as there is room."""
    known = [x for x in expected if x is not None]
    mean = sum(known) / max(len(known), 1) or 1.0
    tokens = [mean if x is None else x for x in expected]
    fewest, more = divmod(len(expected) * n, replicas)
    room = [fewest + (r < more) for r in range(replicas)]
    load = [0.0] * replicas
    out: list[list[Share]] = [[] for _ in range(replicas)]
    for prompt in sorted(range(len(expected)), key=lambda i: (-tokens[i], i)):
        begun = 0
        while begun < n:
            r = min((r for r in range(replicas) if room[r]), key=lambda r: (load[r], r))
            samples = min(room[r], n - begun)
            out[r].append(Share(prompt, begun, samples))
            room[r] -= samples
            load[r] += samples * tokens[prompt]
            begun += samples
    return out


class Seen(NamedTuple):
    """What replicas know of their sequences by now, by prompt."""

    ended: Mapping[int, tuple[int, int]]
    """How many have ended, and their tokens in all."""
    ages: Mapping[int, Sequence[int]]
    """Tokens so far of those under way."""


class Board:
    """What the replicas of one call of the fleet tell one another, in a store that every process reaches."""

    def __init__(self, store: Any, replica: int, replicas: int) -> None:
        self._store, self.replica, self.replicas = store, replica, replicas
        self._mine = ["taken"] if replica == 0 else []

    def take(self, count: int) -> int:
        """The place of the first of the next `count` in the queue."""
        return int(self._store.add("taken", count)) - count

    def tell(self, seen: Seen) -> None:
        self._set(f"seen/{self.replica}", [list(seen.ended.items()), list(seen.ages.items())])

    def heard(self) -> Seen:
        """What all replicas have told last."""
        ended: dict[int, tuple[int, int]] = {}
        ages: dict[int, Sequence[int]] = {}
        for replica in range(self.replicas):
            theirs, running = self._get(f"seen/{replica}")
            for prompt, (count, tokens) in theirs:
                before = ended.get(prompt, (0, 0))
                ended[prompt] = before[0] + count, before[1] + tokens
            for prompt, of_prompt in running:
                ages[prompt] = [*ages.get(prompt, ()), *of_prompt]
        return Seen(ended, ages)

    def publish(self, batch: int, prompts: Sequence[int]) -> None:
        self._set(f"batch/{batch}", list(prompts))

    def published(self, batch: int) -> list[int]:
        """Waits for it."""
        return list(self._get(f"batch/{batch}"))

    def clear(self) -> None:
        """Deletes what this replica has written, once nobody reads any more."""
        for key in self._mine:
            self._store.delete_key(key)
        self._mine = []

    def _set(self, key: str, value: Any) -> None:
        self._store.set(key, json.dumps(value))
        if key not in self._mine:
            self._mine.append(key)

    def _get(self, key: str) -> Any:
        return json.loads(self._store.get(key))


class Order:
    """Every sample of every prompt, in the order of the queue: `head`, which is dealt out, then place after place.

    Where nothing is known of some prompts, one sample of each of them is at the very front. The places behind those are put in
    order `batch` at a time, each batch by the replica that takes its first place, from what all have told by then.

    Args:
        expected: tokens of a completion of each prompt, None where nothing is known.
        dealt: the length of `head`.
    """

    def __init__(self, expected: Sequence[float | None], n: int, dealt: int, board: Board) -> None:
        self._expected, self._n, self._board = expected, n, board
        known = [x for x in expected if x is not None]
        mean = sum(known) / max(len(known), 1)
        prompts = range(len(expected))
        first = [Share(i, 0, 1) for i in prompts if expected[i] is None and n > 1]
        rest = [Share(i, sample, 1) for i in prompts for sample in range(n) if sample > 0 or expected[i] is not None or n == 1]

        def place(share: Share) -> tuple[float, int, int]:
            known = expected[share.prompt]
            return (-mean, share.first, share.prompt) if known is None else (-known, share.prompt, share.first)

        order = first + sorted(rest, key=place)
        self.head = order[:dealt]
        self._fixed = order[dealt : max(dealt, len(first))] if first else order[dealt:]
        self._length = len(order) - dealt
        begun = Counter(share.prompt for share in self.head + self._fixed)
        self._next = [begun[i] for i in prompts]
        self._batches: list[list[Share]] = []
        self.batch = max(8, 2 * board.replicas)
        self.learns = len(self._fixed) < self._length

    def __len__(self) -> int:
        """Places behind the head."""
        return self._length

    def __getitem__(self, place: int) -> Share:
        """Of a place that this replica has taken."""
        if place < len(self._fixed):
            return self._fixed[place]
        batch, at = divmod(place - len(self._fixed), self.batch)
        while len(self._batches) <= batch:
            number = len(self._batches)
            if number == batch and at == 0:
                prompts = self._choose(self._board.heard())
                self._board.publish(number, prompts)
            else:
                prompts = self._board.published(number)
            shares = []
            for prompt in prompts:
                shares.append(Share(prompt, self._next[prompt], 1))
                self._next[prompt] += 1
            self._batches.append(shares)
        return self._batches[batch][at]

    def _choose(self, seen: Seen) -> list[int]:
        """The prompts of the next batch: those whose completions seem to be the longest.

        Of lengths of which some are only known to be longer than so much, tokens by ends is the estimate of the mean (the
        maximum likelihood of the exponential distribution). A prompt's own count beside one end at the mean of all, or n at
        what they were before.
        """
        ends = sum(count for count, _ in seen.ended.values())
        tokens = sum(total for _, total in seen.ended.values()) + sum(sum(ages) for ages in seen.ages.values())
        mean = tokens / max(ends, 1)

        def seems(prompt: int) -> float:
            count, total = seen.ended.get(prompt, (0, 0))
            ages = seen.ages.get(prompt, ())
            known = self._expected[prompt]
            before, length = (1, mean) if known is None else (self._n, known)
            return max((total + sum(ages) + before * length) / (count + before), *ages, 0)

        out: list[int] = []
        left = [i for i in range(len(self._next)) if self._next[i] < self._n]
        for prompt in sorted(left, key=lambda i: (-seems(i), i)):
            out += [prompt] * (self._n - self._next[prompt])
            if len(out) >= self.batch:
                break
        return out[: self.batch]


class Queue:
    """What one replica begins, asked before each step of its engine: its part of the head, then the next place whenever one of
    its own has ended. Every process of a replica gets the same; its first process does the taking.

    Args:
        expected: tokens of a completion of each prompt, None where nothing is known.
        within: the axes over which one replica is spread.
        most: sequences that a replica has under way at most.

    Attributes:
        slots: that it has under way at most, here.
    """

    def __init__(self, expected: Sequence[float | None], n: int, within: Sequence[Axis], most: int, board: Board) -> None:
        self._within, self._board = within, board
        self._speaks = all(axis.first for axis in within)
        count = len(expected) * n
        self.slots = max(1, min(most, -(-count // board.replicas)))
        fits = count <= most * board.replicas
        self._order = Order(expected, n, count if fits else self.slots * board.replicas, board)
        self._head: list[Share] | None = (
            dealt(expected, n, board.replicas)[board.replica] if fits else self._order.head[board.replica :: board.replicas]
        )
        self._over = fits
        self._steps = 0
        self._begun: dict[tuple[int, int], int] = {}  # when, in steps
        self._ended: dict[int, tuple[int, int]] = {}
        self._news = True

    def __call__(self, running: int) -> list[Share]:
        self._steps += 1
        if self._speaks and self._order.learns and self._news:
            ages = defaultdict(list)
            for (prompt, _), step in self._begun.items():
                ages[prompt].append(self._steps - step)
            self._board.tell(Seen(self._ended, ages))
        self._news = False
        if self._head is not None:
            shares, self._head = self._head, None
        else:
            free = self.slots - running
            shares = self._take(free) if free > 0 and not self._over else []
        for prompt, first, samples in shares:
            for sample in range(first, first + samples):
                self._begun[prompt, sample] = self._steps
        return together(shares)

    def finished(self, prompt: int, sample: int, tokens: int) -> None:
        count, total = self._ended.get(prompt, (0, 0))
        self._ended[prompt] = count + 1, total + tokens
        self._begun.pop((prompt, sample), None)
        self._news = True

    def close(self) -> None:
        """Once all replicas are done."""
        if self._speaks:
            self._board.clear()

    def _take(self, free: int) -> list[Share]:
        told = torch.full((1 + free, 2), -1, dtype=torch.int64)  # whether that was all; prompts and samples
        if self._speaks:
            left = len(self._order) - self._board.take(0)
            count = min(free, max(0, -(-left // self._board.replicas)))  # not all of the last ones to whoever comes first
            at = self._board.take(count)
            end = min(at + count, len(self._order))
            told[0] = int(end == len(self._order))
            for row, place in zip(told[1:], range(at, end), strict=False):
                row[0], row[1], _ = self._order[place]
        for axis in self._within:
            if axis.size > 1:
                told = told.to(_device(axis.group))
                dist.broadcast(told, src=axis.ranks[0], group=axis.group)
        (over, _), *rows = told.tolist()
        self._over = bool(over)
        return [Share(prompt, sample, 1) for prompt, sample in rows if prompt >= 0]


def _device(group: Any) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else torch.device("cpu")
