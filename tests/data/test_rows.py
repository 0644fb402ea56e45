"""Rows: fields with errors that name their place, views, joins."""

from __future__ import annotations

import pytest
from fastrlhf.data import DataError, Rows
from fastrlhf.data.rows import Joined, Row


def test_list():
    rows = Rows.from_list([{"a": i} for i in range(5)], "numbers")
    assert len(rows) == 5 and rows.name == "numbers"
    assert [r["a"] for r in rows] == [0, 1, 2, 3, 4]
    assert rows[-1]["a"] == 4 and rows[-1].where == "numbers:5"
    assert dict(rows[2]) == {"a": 2} and "a" in rows[2] and "b" not in rows[2]


@pytest.mark.parametrize("index", [5, -6])
def test_out_of_range(index):
    rows = Rows.from_list([{"a": i} for i in range(5)], "numbers")
    with pytest.raises(IndexError, match=rf"numbers: row {index} of 5"):
        rows[index]


def test_view_keeps_where():
    rows = Rows.from_list([{"a": i} for i in range(10)], "n")
    view = rows[2:9:3]
    assert isinstance(view, Rows) and [r["a"] for r in view] == [2, 5, 8]
    assert view[1].where == "n:6" and view[-1].where == "n:9"
    assert [r["a"] for r in view[1:]] == [5, 8]
    assert len(rows[4:2]) == 0


def test_joined():
    parts = [Rows.from_list([{"a": (p, i)} for i in range(n)], f"p{p}") for p, n in enumerate((2, 1, 3))]
    rows = Joined(parts)
    assert [r["a"] for r in rows] == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)]
    assert rows[3].where == "p2:1" and rows.name == "p0,p1,p2"


def test_fields():
    row = Row({"s": "text", "n": 3, "null": None, "half": "a\ud800"}, "f.jsonl:7")
    assert row.text("s") == "text" and row.field("n") == 3
    assert row.has("s", "n") and not row.has("s", "null") and not row.has("x")
    for call, message in (
        (lambda: row.text("x"), "f.jsonl:7: no field 'x'; the row has ['s', 'n', 'null', 'half']"),
        (lambda: row.text("null"), "f.jsonl:7: field 'null' is null"),
        (lambda: row.text("n"), "f.jsonl:7: field 'n': expected a string, got int"),
        (lambda: row.text("half"), "f.jsonl:7: field 'half': '\\ud800' at 1 is half a character"),
    ):
        with pytest.raises(DataError) as error:
            call()
        assert str(error.value) == message


def test_list_of_other_things():
    with pytest.raises(DataError, match="n:2: expected a mapping of fields, got int"):
        Rows.from_list([{"a": 1}, 3], "n")
