"""Sequences into bins: packed one after another, or padded to the longest of the bin."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def pack(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Bins of indices with at most max_tokens tokens each, by first-fit-decreasing: every sequence, the longest first,
    goes to the first bin with room for it. At most 11/9 of the fewest bins + 6/9 (Dosa 2007). Deterministic.

    A sequence longer than max_tokens gets a bin of its own. ValueError for a length or max_tokens < 1.
    """
    _check(lengths, max_tokens)
    bins: list[list[int]] = []
    free = _FirstWithRoom(len(lengths), max_tokens)
    for i in _longest_first(lengths):
        at = free.take(lengths[i])
        if at == len(bins):
            bins.append([])
        bins[at].append(i)
    return bins


def batches_by_tokens(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Bins of indices of similar lengths, the longest first, such that padded to its longest a bin has at most
    max_tokens tokens: max(lengths in bin) * len(bin) <= max_tokens. Deterministic.

    A sequence longer than max_tokens gets a bin of its own. ValueError for a length or max_tokens < 1.
    """
    _check(lengths, max_tokens)
    bins: list[list[int]] = []
    for i in _longest_first(lengths):
        if not bins or lengths[bins[-1][0]] * (len(bins[-1]) + 1) > max_tokens:
            bins.append([])
        bins[-1].append(i)
    return bins


def _check(lengths: Sequence[int], max_tokens: int) -> None:
    if max_tokens < 1:
        raise ValueError(f"max_tokens: expected at least 1, got {max_tokens}")
    for i, n in enumerate(lengths):
        if n < 1:
            raise ValueError(f"lengths[{i}]: expected at least 1, got {n}")


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


class _FirstWithRoom:
    """The room left in each of `count` bins, as a tree of maxima: the first with enough in O(log count)."""

    def __init__(self, count: int, room: int) -> None:
        self._room = room
        self._leaves = 1 << max(0, count - 1).bit_length()
        self._most = [room] * (2 * self._leaves)

    def take(self, length: int) -> int:
        """The first bin with room for `length`, which is taken; all of the first empty one where `length` is too much."""
        length = min(length, self._room)
        node = 1
        while node < self._leaves:
            node *= 2
            if self._most[node] < length:
                node += 1
        bin_ = node - self._leaves
        self._most[node] -= length
        while node := node // 2:
            self._most[node] = max(self._most[2 * node], self._most[2 * node + 1])
        return bin_


def spread(lengths: Sequence[int], bins: int) -> list[list[int]]:
    """Indices in `bins` bins of about equal sums of lengths, by longest-processing-time: the longest first, each to the bin
    with the least so far. At most 4/3 - 1/(3 bins) of the best largest sum (Graham 1969). Deterministic."""
    sums: list[tuple[int, int]] = [(0, b) for b in range(bins)]
    out: list[list[int]] = [[] for _ in range(bins)]
    for i in _longest_first(lengths):
        total, at = heapq.heappop(sums)
        out[at].append(i)
        heapq.heappush(sums, (total + lengths[i], at))
    return [sorted(members) for members in out]


def micro_batches_for(lengths: Sequence[int], max_tokens: int, stages: int) -> list[list[int]]:
    """`batches_by_tokens`, in at least as many bins as a pipeline has stages where there are as many sequences: fewer would
    leave stages idle."""
    if not lengths:
        return []
    bins = batches_by_tokens(lengths, max_tokens)
    room = min(max_tokens, max(lengths) * len(lengths))
    while len(bins) < min(stages, len(lengths)) and room > 1:
        room = room * 3 // 4
        bins = batches_by_tokens(lengths, room)
    return bins
