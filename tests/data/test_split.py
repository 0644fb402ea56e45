"""Held-out rows: disjoint, all of them, the same again."""

from __future__ import annotations

import pytest
from fastrlhf.data import Rows, split


def numbers(n):
    return Rows.from_list([{"a": i} for i in range(n)], "numbers")


@pytest.mark.parametrize("length, held_out, count", [(100, 10, 10), (100, 0.25, 25), (7, 0.01, 1), (2, 1, 1), (1001, 0.5, 500)])
def test_disjoint_and_covering(length, held_out, count):
    rows = numbers(length)
    train, held = split(rows, held_out, seed=3)
    assert len(held) == count and len(train) == length - count
    taken = [r["a"] for r in (*train, *held)]
    assert sorted(taken) == list(range(length))
    assert all(r.where == f"numbers:{r['a'] + 1}" for r in held)
    again = split(numbers(length), held_out, seed=3)
    assert [r["a"] for part in again for r in part] == taken


def test_seed_chooses_and_no_part_is_a_run():
    held = [r["a"] for r in split(numbers(1000), 100, seed=0)[1]]
    other = [r["a"] for r in split(numbers(1000), 100, seed=1)[1]]
    assert 0 < len(set(held) & set(other)) < 30  # 10 expected
    assert 350 < sum(held) / 100 < 650


@pytest.mark.parametrize(
    "held_out, error, message",
    [
        (0, ValueError, "held_out: 0 of the 10 rows of numbers leaves a part empty"),
        (10, ValueError, "held_out: 10 of the 10 rows"),
        (0.99, ValueError, "held_out: 0.99 of the 10 rows"),
        (1.0, ValueError, "held_out: a share is in"),
        (0.0, ValueError, "held_out: a share is in"),
        (True, TypeError, "held_out: expected an int or a float, got bool"),
        ("1", TypeError, "held_out: expected an int or a float, got str"),
    ],
)
def test_errors(held_out, error, message):
    with pytest.raises(error, match=message):
        split(numbers(10), held_out, 0)
