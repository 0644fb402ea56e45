"""Files derived from data files: built once for a version of the file, written aside and renamed, shared by processes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

FORMAT = 1


def directory() -> Path:
    """`FASTRLHF_CACHE`, or `fastrlhf` in `XDG_CACHE_HOME` or in `~/.cache`."""
    if chosen := os.environ.get("FASTRLHF_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastrlhf"


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    """A directory of this process alone, removed when it ends."""
    return tempfile.TemporaryDirectory(prefix="fastrlhf-")


def derived(source: Path, suffix: str, build: Callable[[BinaryIO], None]) -> Path:
    """The path of the file that `build(out)` derives from `source`, built only where it is not there yet.

    Its name holds the source's path, size and modification time, so a changed source gets a new one. It is written
    under another name and renamed when complete: a reader, or another process building it too, never sees half a file.
    Where the cache directory cannot be written (read-only, full) it goes to a temporary directory of this process.
    Whatever `build` raises on reading passes through.
    """
    stat = source.stat()
    key = f"{FORMAT}\0{source.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
    name = f"{source.name[:80]}-{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()[:24]}{suffix}"
    shared = directory() / name
    with contextlib.suppress(OSError):
        if shared.is_file():
            return shared
    try:
        _write(shared, build)
        return shared
    except CannotWrite:
        private = Path(_temporary().name) / name
        if not private.is_file():
            _write(private, build)
        return private


class CannotWrite(OSError):
    """The derived file could not be written, which says nothing of its source."""


class _Out(io.BufferedWriter):
    """Tells a failed write of the derived file apart from a failed read of its source."""

    def write(self, data: Any) -> int:
        with _writing():
            return super().write(data)

    def flush(self) -> None:
        with _writing():
            super().flush()


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CannotWrite(*error.args) from error


def _write(path: Path, build: Callable[[BinaryIO], None]) -> None:
    with _writing():
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, aside = tempfile.mkstemp(prefix=path.name, suffix=".part", dir=path.parent)
    try:
        with _Out(io.FileIO(descriptor, "wb")) as out:
            build(out)
            out.flush()
            with _writing():
                os.fsync(descriptor)  # a rename may reach the disk before what was written
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise
