"""JSON Lines, plain or gzipped: an index of offsets on disk, one line read and parsed for one row."""

from __future__ import annotations

import gzip
import json
import os
import weakref
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from . import cache
from .rows import DataError, Row, Rows

INDEXED_AT_ONCE = 1 << 16


class JsonLines(Rows):
    """The rows of a JSON Lines file; blank lines are none.

    Opening reads the file once and writes 16 bytes a row, (offset, line number), to the cache; a gzipped file is
    unpacked there first. After that a row costs one read of its line, and memory does not grow with the file.
    A line that is not UTF-8, not JSON or not an object raises DataError naming file and line when its row is read.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._path = cache.derived(path, ".jsonl", lambda out: _unpack(path, out)) if path.suffix == ".gz" else path
        index = cache.derived(self._path, ".index", lambda out: _index(self._path, out))
        if index.stat().st_size == 0:
            raise DataError(f"{path}: the file has no rows")
        self._index = np.memmap(index, dtype=np.int64, mode="r").reshape(-1, 2)
        self._file = open(self._path, "rb", buffering=0)  # noqa: SIM115  # held for the life of the rows
        weakref.finalize(self, self._file.close)
        self._size = os.fstat(self._file.fileno()).st_size

    def __len__(self) -> int:
        return len(self._index)

    def read(self, index: int) -> Row:
        start, line = (int(x) for x in self._index[index])
        end = int(self._index[index + 1, 0]) if index + 1 < len(self._index) else self._size
        where = f"{self.name}:{line}"
        data = os.pread(self._file.fileno(), end - start, start)  # not a seek: threads and forks share the position
        if len(data) != end - start:
            raise DataError(f"{where}: {self._path} became shorter while it was open")
        return Row(_parse(data, where), where)


def _parse(data: bytes, where: str) -> dict[str, object]:
    try:
        text = data.decode("utf-8").rstrip()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8: byte 0x{data[error.start]:02x} at byte {error.start + 1} of the line") from None
    try:
        record = json.loads(text.removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at character {error.pos + 1} of {_excerpt(text)}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON that can be read: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(record).__name__} {_excerpt(text)}")
    return record


def _excerpt(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _index(path: Path, out: BinaryIO) -> None:
    entries: list[int] = []
    offset = 0
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.isspace():
                entries += (offset, number)
                if len(entries) >= INDEXED_AT_ONCE:
                    out.write(np.array(entries, dtype=np.int64).tobytes())
                    entries.clear()
            offset += len(line)
    out.write(np.array(entries, dtype=np.int64).tobytes())


def _unpack(path: Path, out: BinaryIO) -> None:
    try:
        with gzip.open(path, "rb") as packed:
            while block := packed.read(1 << 20):
                out.write(block)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file: {error}") from None
