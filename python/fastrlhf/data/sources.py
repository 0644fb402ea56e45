"""From a path, several, or a hub name to rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .arrow import Parquet, open_hub, open_saved
from .jsonl import JsonLines
from .rows import DataError, Joined, Rows

FORMATS: dict[str, type[JsonLines] | type[Parquet]] = {
    ".jsonl": JsonLines,
    ".jsonl.gz": JsonLines,
    ".json.gz": JsonLines,
    ".json": JsonLines,
    ".parquet": Parquet,
}
HUB = "hf:"


def open_rows(path: str | Path | Sequence[str | Path], *, split: str = "train", limit: int | None = None) -> Rows:
    """Rows of one or several sources, one after another, read on demand.

    path: a `.jsonl`, `.jsonl.gz` or `.parquet` file; a pattern of such, as in `part-*.parquet`, in order of name;
        a directory with files named after the split (`train.jsonl`, `train-00000-of-00002.parquet`) or written by
        Hugging Face's `save_to_disk`; `hf:owner/dataset` or `hf:owner/dataset:configuration`; a list of these, or
        such a list in one string with commas.
    split: which split of a directory or hub dataset; a file is read whole.
    limit: at most so many rows, from the first.

    Raises FileNotFoundError where nothing is at the path, DataError (a ValueError) naming the file where the suffix
    is unknown, the file is empty or damaged, or the split is not there. A broken line raises when its row is read.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1, got {limit}")
    parts = [_open(source, split) for source in _sources(path)]
    rows = parts[0] if len(parts) == 1 else Joined(parts)
    return rows if limit is None or limit >= len(rows) else rows[:limit]


def _sources(path: str | Path | Sequence[str | Path]) -> list[str | Path]:
    """The hub names and existing files and directories that `path` stands for."""
    if isinstance(path, str) and "," in path and not Path(path).exists():
        path = [part.strip() for part in path.split(",")]
    listed = [path] if isinstance(path, (str, Path)) else list(path)
    if not listed or not all(str(item) for item in listed):
        raise ValueError(f"path: expected a path or several, got {path!r}")
    found: list[str | Path] = []
    for item in listed:
        if isinstance(item, str) and item.startswith(HUB):
            found.append(item)
            continue
        plain = Path(item).expanduser()
        if plain.exists():
            found.append(plain)
            continue
        matches = sorted(plain.parent.glob(plain.name)) if any(c in plain.name for c in "*?[") else []
        if not matches:
            raise FileNotFoundError(f"{plain}: no such file or directory (a hub dataset is written {HUB}owner/name)")
        found += matches
    return found


def _open(source: str | Path, split: str) -> Rows:
    if isinstance(source, str):
        return open_hub(source.removeprefix(HUB), split)
    if not source.is_dir():
        return _open_file(source)
    if any((source / name).exists() for name in ("dataset_info.json", "dataset_dict.json", "state.json")):
        return open_saved(source, split)
    named = re.compile(re.escape(split) + r"(-\d+(-of-\d+)?)?\.")
    files = sorted(f for f in source.iterdir() if named.match(f.name) and _suffix(f))
    if not files:
        names = sorted(f.name for f in source.iterdir())[:10]
        raise DataError(
            f"{source}: no file of split {split!r} ({split}.jsonl, {split}-00000-of-00002.parquet, ...); it holds {names}"
        )
    parts = [_open_file(f) for f in files]
    return parts[0] if len(parts) == 1 else Joined(parts)


def _open_file(path: Path) -> Rows:
    if not path.stat().st_size:
        raise DataError(f"{path}: the file is empty")
    suffix = _suffix(path)
    if suffix is None:
        raise DataError(f"{path}: unknown suffix; expected one of {', '.join(FORMATS)}")
    return FORMATS[suffix](path)


def _suffix(path: Path) -> str | None:
    return next((suffix for suffix in FORMATS if path.name.lower().endswith(suffix)), None)
