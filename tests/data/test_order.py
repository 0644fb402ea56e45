"""The order of rows: a permutation for every length and epoch, the same everywhere, resumed exactly, divided disjointly."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from fastrlhf.data import DataError, Order, Rows, Stream, open_rows

LENGTHS = [*range(1, 40), 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 4097, 7473, 10_007]


def numbers(n: int) -> Rows:
    return Rows.from_list([{"a": i} for i in range(n)], "numbers")


@pytest.mark.parametrize("length", LENGTHS)
def test_every_epoch_is_a_permutation(length):
    for seed in (0, 1, -5, 2**70):
        order = Order(length, seed)
        for epoch in range(2):
            taken = [order[epoch * length + i] for i in range(length)]
            assert sorted(taken) == list(range(length))


def test_large_length_stays_inside_and_distinct():
    order = Order(2**40 + 12345, 3)
    taken = [order[i] for i in range(20_000)]
    assert len(set(taken)) == 20_000 and min(taken) >= 0 and max(taken) < order.length
    assert 0.48 < np.mean(taken) / order.length < 0.52


def test_same_for_ever():
    """A saved run must go on after an upgrade: these numbers may never change."""
    assert [Order(10, 0)[i] for i in range(20)] == [0, 3, 6, 2, 8, 7, 5, 9, 1, 4, 4, 7, 3, 2, 5, 9, 6, 0, 8, 1]
    assert [Order(7473, 17)[i] for i in range(6)] == [3708, 593, 1573, 2587, 3274, 5860]


def test_epochs_and_seeds_differ():
    length = 1000
    orders = [tuple(Order(length, seed)[epoch * length + i] for i in range(length)) for seed in range(4) for epoch in range(4)]
    orders += [tuple(range(length))]
    for a, b in itertools.combinations(orders, 2):
        assert sum(x == y for x, y in zip(a, b)) < 12  # 1 expected


@pytest.mark.parametrize("length", [2, 3, 5, 8, 13])
def test_every_row_comes_equally_often_to_every_place(length):
    """Pearson's chi-square over seeds: `length` times the (length - 1) degrees of a place."""
    draws = 3000
    counts = np.zeros((length, length))
    for seed in range(draws):
        order = Order(length, seed)
        for place in range(length):
            counts[place, order[place]] += 1
    chi = ((counts - draws / length) ** 2 / (draws / length)).sum()
    freedom = (length - 1) ** 2
    assert chi < freedom + 5 * (2 * freedom) ** 0.5


def test_neighbours_are_unrelated():
    length = 5000
    taken = np.array([Order(length, 2)[i] for i in range(length)])
    assert abs(np.corrcoef(taken[1:], taken[:-1])[0, 1]) < 0.06
    assert abs(np.corrcoef(taken, np.arange(length))[0, 1]) < 0.06


def test_no_shuffle():
    assert [Order(3, 5, shuffle=False)[k] for k in range(8)] == [0, 1, 2, 0, 1, 2, 0, 1]


def test_constant_memory():
    order = Order(10**12, 0)
    tracemalloc.start()
    try:
        for k in range(0, 3 * 10**12, 10**10):
            order[k]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20_000


def test_order_errors():
    with pytest.raises(ValueError, match="length: expected at least 1, got 0"):
        Order(0, 0)
    with pytest.raises(IndexError, match="position: expected at least 0, got -1"):
        Order(3, 0)[-1]
    with pytest.raises(TypeError):
        Order(3, 0.5)


def test_stream_takes_every_row_once_an_epoch():
    stream = Stream(numbers(10), seed=1)
    taken = [stream.next(3) for _ in range(10)]
    assert all(row["a"] == index for batch in taken for index, row in batch)
    flat = [index for batch in taken for index, _ in batch]
    assert all(sorted(flat[e * 10 : e * 10 + 10]) == list(range(10)) for e in range(3))
    assert stream.position == 30 and stream.epoch == 3


@pytest.mark.parametrize("at", [0, 1, 7, 10, 25])
def test_resume_equals_never_stopped(at):
    whole, first = Stream(numbers(10), 3), Stream(numbers(10), 3)
    expected = [whole.next(1)[0][0] for _ in range(40)]
    assert [i for i, _ in first.next(at)] == expected[:at]
    second = Stream(numbers(10), 3)
    second.load_state_dict(first.state_dict())
    assert [i for i, _ in second.next(40 - at)] == expected[at:]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"length": 11}, "numbers: saved with length 11, opened with 10"),
        ({"seed": 4}, "numbers: saved with seed 4, opened with 3"),
        ({"shuffle": False}, "numbers: saved with shuffle False, opened with True"),
        ({"position": -1}, "numbers: position -1"),
        ({"position": "7"}, "numbers: position '7'"),
    ],
)
def test_state_of_another_stream_is_refused(change, message):
    stream = Stream(numbers(10), 3)
    stream.next(4)
    with pytest.raises(ValueError, match=message):
        stream.load_state_dict({**stream.state_dict(), **change})
    assert stream.position == 4
    with pytest.raises(ValueError, match=r"no \['seed'\]"):
        stream.load_state_dict({k: v for k, v in stream.state_dict().items() if k != "seed"})


@pytest.mark.parametrize("length, world", [(10, 1), (10, 3), (12, 4), (3, 8)])
def test_shards_are_disjoint_and_cover(length, world):
    shards = [Stream(numbers(length), 5).shard(rank, world) for rank in range(world)]
    whole = [i for i, _ in Stream(numbers(length), 5).next(4 * length * world)]
    rounds = [[i for shard in shards for i, _ in shard.next(1)] for _ in range(4 * length)]
    assert [i for r in rounds for i in r] == whole


def test_shards_resume_on_another_number_of_ranks():
    whole = [i for i, _ in Stream(numbers(20), 5).next(36)]
    four = [Stream(numbers(20), 5).shard(rank, 4) for rank in range(4)]
    assert sorted(i for s in four for i, _ in s.next(3)) == sorted(whole[:12])
    assert len({tuple(s.state_dict().items()) for s in four}) == 1
    three = [Stream(numbers(20), 5).shard(rank, 3) for rank in range(3)]
    for s in three:
        s.load_state_dict(four[0].state_dict())
    assert sorted(i for s in three for i, _ in s.next(8)) == sorted(whole[12:])


def test_shard_begins_where_the_stream_stands():
    stream = Stream(numbers(20), 5)
    first = [i for i, _ in stream.next(4)]
    rest = [i for rank in range(2) for i, _ in stream.shard(rank, 2).next(8)]
    assert sorted(first + rest) == list(range(20))


@pytest.mark.parametrize("rank, world", [(2, 2), (-1, 2), (0, 0)])
def test_shard_errors(rank, world):
    with pytest.raises(ValueError, match="rank, world"):
        Stream(numbers(3), 0).shard(rank, world)
    with pytest.raises(ValueError, match="rank, world"):
        Stream(numbers(3), 0).shard(0, 2).shard(0, 2)


def test_broken_row_takes_none(write):
    stream = Stream(open_rows(write("t.jsonl", [{"a": 0}, {"a": 1}, "{", {"a": 3}])), 0, shuffle=False)
    stream.next(1)
    with pytest.raises(DataError, match=r"t\.jsonl:3"):
        stream.next(3)
    assert stream.position == 1 and [i for i, _ in stream.next(1)] == [1]


def test_empty_rows():
    with pytest.raises(DataError, match="numbers: no rows to take"):
        Stream(numbers(0), 0)
