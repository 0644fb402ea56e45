"""open_rows: files, lists, patterns, directories, Parquet, saved datasets, the hub; and what is said where nothing is."""

from __future__ import annotations

import json
import re
import sys
import tracemalloc

import pytest
from fastrlhf.data import DataError, open_rows
from fastrlhf.errors import MissingExtra

from .conftest import real


def values(rows):
    return [r["a"] for r in rows]


@pytest.fixture
def three(write):
    return [write(f"{name}.jsonl", [{"a": f"{name}{i}"} for i in range(2)]) for name in "xyz"]


def test_several_paths(three):
    x, y, _ = three
    expected = ["y0", "y1", "x0", "x1"]
    for path in ([y, x], [str(y), x], f"{y},{x}", f"{y}, {x}", (y, x)):
        assert values(open_rows(path)) == expected
    assert open_rows([y, x])[2].where == "x.jsonl:1"


def test_pattern_and_comma_in_a_name(three, write):
    assert values(open_rows(three[0].parent / "*.jsonl")) == ["x0", "x1", "y0", "y1", "z0", "z1"]
    assert values(open_rows(str(three[0].parent / "[yz].jsonl"))) == ["y0", "y1", "z0", "z1"]
    assert values(open_rows(str(write("a,b.jsonl", [{"a": 1}])))) == [1]


def test_limit(three):
    assert values(open_rows(three, limit=3)) == ["x0", "x1", "y0"]
    assert len(open_rows(three, limit=100)) == 6
    with pytest.raises(ValueError, match="limit: expected at least 1, got 0"):
        open_rows(three, limit=0)


def test_directory_of_splits(tmp_path):
    for name in ("train", "test", "training", "train-extra", "train-00001-of-00002"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"a": name}))
    (tmp_path / "train.txt").write_text("no data")
    assert values(open_rows(tmp_path)) == ["train-00001-of-00002", "train"]
    assert values(open_rows(tmp_path, split="test")) == ["test"]
    with pytest.raises(DataError, match=r"no file of split 'dev' .* it holds .*'test.jsonl'"):
        open_rows(tmp_path, split="dev")


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda d: d / "none.jsonl", FileNotFoundError, "none.jsonl: no such file or directory"),
        (lambda d: d / "none-*.jsonl", FileNotFoundError, "none-*.jsonl: no such file or directory"),
        (lambda d: "owner/name", FileNotFoundError, "(a hub dataset is written hf:owner/name)"),
        (lambda d: [], ValueError, "path: expected a path or several, got []"),
        (lambda d: "", ValueError, "path: expected a path or several, got ''"),
        (lambda d: d / "empty.jsonl", DataError, "empty.jsonl: the file is empty"),
        (lambda d: d / "blank.jsonl", DataError, "blank.jsonl: the file has no rows"),
        (lambda d: d / "table.csv", DataError, "table.csv: unknown suffix; expected one of .jsonl, .jsonl.gz"),
        (lambda d: d / "bad.parquet", DataError, "bad.parquet: not Parquet that can be read: "),
    ],
)
def test_nothing_there(tmp_path, make, error, message):
    if message.startswith("bad.parquet"):
        pytest.importorskip("pyarrow")
    for name, text in (("empty.jsonl", ""), ("blank.jsonl", "\n \n"), ("table.csv", "a\n1\n"), ("bad.parquet", "PAR1 no")):
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=re.escape(message)):
        open_rows(make(tmp_path))


def test_parquet(tmp_path, cache):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    records = [{"a": i, "s": f"ä{i}" if i % 3 else None, "m": [{"role": "user", "content": str(i)}]} for i in range(1000)]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "t.parquet", row_group_size=300)
    for _ in range(2):
        rows = open_rows(tmp_path / "t.parquet")
        assert len(rows) == 1000 and rows[299].where == "t.parquet:300"
        assert [dict(rows[i]) for i in (0, 255, 256, 299, 300, 999, 3)] == [records[i] for i in (0, 255, 256, 299, 300, 999, 3)]
        assert len(list(cache.iterdir())) == 1
    pq.write_table(pa.Table.from_pylist(records[:0], schema=pa.Table.from_pylist(records).schema), tmp_path / "none.parquet")
    with pytest.raises(DataError, match=r"none\.parquet: the file has no rows"):
        open_rows(tmp_path / "none.parquet")


def test_parquet_memory_does_not_grow_with_the_file(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    with pq.ParquetWriter(tmp_path / "t.parquet", pa.schema([("a", pa.int64()), ("s", pa.string())])) as writer:
        for start in range(0, 100_000, 5000):
            columns = {"a": range(start, start + 5000), "s": [f"{i}" * 60 for i in range(start, start + 5000)]}
            writer.write_table(pa.table({k: list(v) for k, v in columns.items()}))
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        rows = open_rows(tmp_path / "t.parquet")
        assert all(rows[i]["a"] == i for i in range(0, 100_000, 997))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2e6 and pa.total_allocated_bytes() - before < 1e6, "29 MB of text"


def test_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    train = datasets.Dataset.from_list([{"a": i} for i in range(5)])
    train.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": train, "test": train.select([3])}).save_to_disk(str(tmp_path / "two"))
    assert values(open_rows(tmp_path / "one")) == [0, 1, 2, 3, 4]
    rows = open_rows(tmp_path / "two", split="test")
    assert values(rows) == [3] and rows[0].where == "two[test]:1"
    assert values(open_rows([tmp_path / "one", tmp_path / "two"], limit=7)) == [0, 1, 2, 3, 4, 0, 1]
    with pytest.raises(DataError, match=r"two: no split 'dev'; the dataset has \['train', 'test'\]"):
        open_rows(tmp_path / "two", split="dev")
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"damage")
    with pytest.raises(DataError, match="one: not a dataset that can be read: "):
        open_rows(tmp_path / "one")


def test_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, configuration, split):
        asked.append((name, configuration, split))
        if split == "none":
            raise ValueError("Unknown split")
        return datasets.Dataset.from_list([{"a": 1}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = open_rows("hf:openai/gsm8k:main", split="test")
    assert values(rows) == [1] and rows[0].where == "hf:openai/gsm8k:main[test]:1"
    open_rows("hf:Anthropic/hh-rlhf")
    assert asked == [("openai/gsm8k", "main", "test"), ("Anthropic/hh-rlhf", None, "train")]
    with pytest.raises(DataError, match=r"hf:x/y: split 'none' cannot be loaded: Unknown split"):
        open_rows("hf:x/y", split="none")


@pytest.mark.parametrize("name, path, extra", [("pyarrow", "t.parquet", "train"), ("datasets", "hf:x/y", "hub")])
def test_missing_library_names_the_extra(tmp_path, monkeypatch, name, path, extra):
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=rf"{name}: not usable here .*pip install 'fastrlhf\[{extra}\]'"):
        open_rows(path if ":" in path else tmp_path / path)


def test_gsm8k():
    rows = open_rows(real("gsm8k"))
    assert len(rows) == 7473 and all("####" in r.text("answer") for r in rows)
    test = open_rows(real("gsm8k"), split="test")
    assert len(test) == 1319 and test[16].where == "test.jsonl:17"


def test_hh_rlhf():
    rows = open_rows(real("hh-rlhf/harmless-base-test.jsonl.gz"))
    assert len(rows) == 2312 and all(r.text("chosen").startswith("\n\nHuman:") for r in rows)
