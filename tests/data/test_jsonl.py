"""JSON Lines: what is a row, what is an error and where, the index on disk, memory."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import re
import tracemalloc

import pytest
from fastrlhf.data import DataError, cache, jsonl, open_rows

GOOD = {"a": "é"}


def test_reads(write):
    rows = open_rows(write("t.jsonl", [{"a": i, "s": "ü\u2028" * i} for i in range(100)]))
    assert len(rows) == 100 and rows.name == "t.jsonl"
    assert [r["a"] for r in rows] == list(range(100))
    assert rows[7]["s"] == "ü\u2028" * 7 and rows[7].where == "t.jsonl:8"


def test_blank_lines_are_no_rows_but_count(write):
    rows = open_rows(write("t.jsonl", ["", {"a": 1}, "   \t", "\r", {"a": 2}, "", "{broken", "", ""]))
    assert len(rows) == 3
    assert (rows[0]["a"], rows[0].where) == (1, "t.jsonl:2")
    assert (rows[1]["a"], rows[1].where) == (2, "t.jsonl:5")
    with pytest.raises(DataError, match=r"^t\.jsonl:7: not JSON"):
        rows[2]


@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n", b"\n\n  \n"])
def test_last_line_and_bom(tmp_path, ending):
    (tmp_path / "t.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}' + ending)
    assert [r["a"] for r in open_rows(tmp_path / "t.jsonl")] == [1, 2]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"a": 1', "t.jsonl:3: not JSON: Expecting ',' delimiter at character 8 of '{\"a\": 1'"),
        ("x" * 100, "t.jsonl:3: not JSON: Expecting value at character 1 of '" + "x" * 57 + "...'"),
        ('{"a": 1} {"a": 2}', "t.jsonl:3: not JSON: Extra data at character 10"),
        ("[1, 2]", "t.jsonl:3: expected a JSON object, got list '[1, 2]'"),
        ('"text"', "t.jsonl:3: expected a JSON object, got str"),
        ("[" * 100_000, "t.jsonl:3: not JSON that can be read: maximum recursion depth"),
        (b'{"a": "\xe9"}', "t.jsonl:3: not UTF-8: byte 0xe9 at byte 8 of the line"),
    ],
)
def test_broken_line_names_file_and_line_and_leaves_others(write, line, message):
    rows = open_rows(write("t.jsonl", [GOOD, GOOD, line, GOOD]))
    assert [rows[i]["a"] for i in (0, 1, 3)] == ["é"] * 3
    for _ in range(2):
        with pytest.raises(DataError, match="^" + re.escape(message)):
            rows[2]


def test_gz(tmp_path, cache):
    lines = [json.dumps({"a": i}) for i in range(1000)] + ["{"]
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    for _ in range(2):
        rows = open_rows(tmp_path / "t.jsonl.gz")
        assert len(rows) == 1001 and rows[999]["a"] == 999 and rows[999].where == "t.jsonl.gz:1000"
        with pytest.raises(DataError, match=r"^t\.jsonl\.gz:1001: not JSON"):
            rows[1000]
        assert sorted(p.suffix for p in cache.iterdir()) == [".index", ".jsonl"]


@pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: b[:40] + b"\xff" * 30 + b[70:], lambda b: b"{}\n" * 9])
def test_damaged_gz(tmp_path, cache, damage):
    whole = gzip.compress("".join(json.dumps({"a": i * 7919}) + "\n" for i in range(1000)).encode())
    (tmp_path / "t.jsonl.gz").write_bytes(damage(whole))
    with pytest.raises(DataError, match=r"t\.jsonl\.gz: not a whole gzip file: "):
        open_rows(tmp_path / "t.jsonl.gz")
    assert list(cache.iterdir()) == [], "half a file was left"


def test_index_is_built_once_and_again_when_the_file_changes(write, monkeypatch, cache):
    built = []
    index = jsonl._index
    monkeypatch.setattr(jsonl, "_index", lambda path, out: (built.append(path), index(path, out)))
    path = write("t.jsonl", [{"a": 1}])
    for _ in range(3):
        assert len(open_rows(path)) == 1
    assert len(built) == 1 and len(list(cache.iterdir())) == 1
    write("t.jsonl", [{"a": 1}, {"a": 2}])
    assert [r["a"] for r in open_rows(path)] == [1, 2]
    write("t.jsonl", [{"a": 3}, {"a": 4}])
    os.utime(path, ns=(1, 1))
    assert [r["a"] for r in open_rows(path)] == [3, 4]
    assert len(built) == 3


def test_file_that_shrinks_while_open(write):
    path = write("t.jsonl", [{"a": i} for i in range(100)])
    rows = open_rows(path)
    os.truncate(path, 20)
    assert rows[0]["a"] == 0
    with pytest.raises(DataError, match=r"^t\.jsonl:51: .* became shorter while it was open"):
        rows[50]


@pytest.mark.parametrize("directory", ["/proc/none", "a_file"])
def test_without_a_writable_cache(write, tmp_path, monkeypatch, directory):
    (tmp_path / "a_file").write_text("")
    monkeypatch.setenv("FASTRLHF_CACHE", str(tmp_path / directory))
    path = write("t.jsonl", [{"a": 1}, {"a": 2}])
    assert [r["a"] for r in open_rows(path)] == [1, 2]
    assert [r["a"] for r in open_rows(path)] == [1, 2]


def test_full_disk_under_the_cache(write, tmp_path, monkeypatch, cache):
    path = write("t.jsonl", [{"a": i} for i in range(10)])

    class Full(jsonl.cache.io.FileIO):
        def write(self, data):
            if str(cache) in os.readlink(f"/proc/self/fd/{self.fileno()}"):
                raise OSError(28, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(jsonl.cache.io, "FileIO", Full)
    assert [r["a"] for r in open_rows(path)] == list(range(10))
    assert list(cache.iterdir()) == []


def test_failed_read_of_the_source_is_not_hidden(write, monkeypatch):
    def broken(path, out):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(jsonl, "_index", broken)
    with pytest.raises(OSError, match="Input/output error"):
        open_rows(write("t.jsonl", [{"a": 1}]))


def _open_and_sum(path, barrier, results):
    barrier.wait()
    rows = open_rows(path)
    results.put((len(rows), sum(r["a"] for r in rows)))


def test_several_processes_build_the_index_at_once(write, cache):
    path = write("t.jsonl", [{"a": i} for i in range(3000)])
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_open_and_sum, args=(path, barrier, results)) for _ in range(4)]
    for p in processes:
        p.start()
    assert [results.get(timeout=20) for _ in processes] == [(3000, 3000 * 2999 // 2)] * 4
    for p in processes:
        p.join()
    assert [p.suffix for p in cache.iterdir()] == [".index"]


def test_memory_does_not_grow_with_the_file(write):
    lines = 200_000
    path = write("t.jsonl", (b'{"a": %d, "text": "%s"}' % (i, b"x" * 60) for i in range(lines)))
    tracemalloc.start()
    try:
        rows = open_rows(path)
        opened = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        assert all(rows[i]["a"] == i for i in range(0, lines, 997))
        read = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(rows) == lines
    assert opened < 6e6, f"{opened} bytes to index {path.stat().st_size}"
    assert read < 1e6, f"{read} bytes to read"


def test_cache_directory(monkeypatch, tmp_path):
    assert cache.directory() == tmp_path / "cache"
    monkeypatch.delenv("FASTRLHF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert str(cache.directory()) == "/xdg/fastrlhf"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(cache.directory()) == "/home/someone/.cache/fastrlhf"
