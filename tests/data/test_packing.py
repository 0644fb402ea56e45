"""Bins: every sequence once, none too full, few of them, the same again."""

from __future__ import annotations

import random

import pytest
from fastrlhf.data import batches_by_tokens, pack


def random_lengths(seed, n, low, high):
    draw = random.Random(seed)
    return [draw.randint(low, high) for _ in range(n)]


def plain_first_fit_decreasing(lengths, max_tokens):
    bins, room = [], []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = next((b for b, free in enumerate(room) if free >= lengths[i]), None)
        if at is None:
            bins.append([])
            room.append(max_tokens)
            at = -1
        bins[at].append(i)
        room[at] -= lengths[i]
    return bins


CASES = [
    (random_lengths(s, n, 1, m), t)
    for s, (n, m, t) in enumerate([(1, 5, 5), (7, 9, 10), (64, 100, 100), (65, 30, 100), (500, 2000, 2048), (300, 3, 1000)])
]


@pytest.mark.parametrize("lengths, max_tokens", [*CASES, ([], 10), ([12, 3, 10, 30], 10)])
def test_pack(lengths, max_tokens):
    bins = pack(lengths, max_tokens)
    assert bins == plain_first_fit_decreasing(lengths, max_tokens)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= max_tokens or len(b) == 1 for b in bins)


@pytest.mark.parametrize("lengths, max_tokens", [*CASES, ([], 10), ([12, 3, 10, 30], 10)])
def test_batches_by_tokens(lengths, max_tokens):
    bins = batches_by_tokens(lengths, max_tokens)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(max(lengths[i] for i in b) * len(b) <= max_tokens or len(b) == 1 for b in bins)
    edges = [(max(lengths[i] for i in b), min(lengths[i] for i in b)) for b in bins]
    assert all(low >= high for (_, low), (high, _) in zip(edges, edges[1:])), "lengths of neighbours overlap"
    for left, right in zip(bins, bins[1:]):
        assert lengths[left[0]] * (len(left) + 1) > max_tokens, f"{right} could have begun in {left}"


def test_little_padding():
    lengths = random_lengths(0, 1000, 1, 512)
    padded = sum(max(lengths[i] for i in b) * len(b) for b in batches_by_tokens(lengths, 4096))
    assert padded < 1.03 * sum(lengths)
    assert len(pack(lengths, 4096)) <= -(-sum(lengths) // 4096) + 1


def test_many_sequences_are_packed_quickly():
    lengths = random_lengths(1, 30_000, 500, 1000)
    assert sum(len(b) for b in pack(lengths, 1024)) == 30_000  # the plain form would look at 3e8 bins


@pytest.mark.parametrize("function", [pack, batches_by_tokens])
def test_errors(function):
    with pytest.raises(ValueError, match="max_tokens: expected at least 1, got 0"):
        function([1], 0)
    with pytest.raises(ValueError, match=r"lengths\[2\]: expected at least 1, got 0"):
        function([1, 2, 0], 5)
