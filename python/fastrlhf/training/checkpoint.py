"""Checkpoints that survive a kill at any point and a full disk.

A checkpoint is a directory: a safetensors file for each group of tensors, `state.json`, what callbacks wrote, and
`manifest.json` with the size and checksum of every file. It is written aside, flushed to disk and renamed; whatever
carries its final name and agrees with its manifest is complete. Nothing is pickled. One process writes a directory.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, extra
from .state import load_into, load_optimizer, optimizer_tensors, restore_rng, rng_tensors

__all__ = [
    "CheckpointError", "Checkpoints", "load_into", "load_optimizer", "optimizer_tensors", "restore_rng", "rng_tensors",
]  # fmt: skip

MANIFEST, STATE, LATEST = "manifest.json", "state.json", "latest"
_NAME = re.compile(r"step-(\d+)(\.replaced)?")
_FLOAT = "$float"
_LEFTOVER = re.compile(r"(step-\d+|latest)\.tmp-\d+")


Files = Mapping[str, tuple[int, int]]
"""Size in bytes and CRC-32 by path."""
Check = Callable[[Path, Files], str | None]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: where they are; made at the first save.
        keep: how many of the latest to keep, at least 1; None keeps all.
        keep_every: also keep for good those of steps that this divides.
    """

    def __init__(self, directory: Path | str, keep: int | None = 2, keep_every: int | None = None) -> None:
        for name, value in (("keep", keep), ("keep_every", keep_every)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1 or None, got {value}")
        self.directory = Path(directory)
        self.keep = keep
        self.keep_every = keep_every
        self._verified: set[tuple[Path, int]] = set()

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        files: Mapping[str, Callable[[Path], Files | None]] | None = None,
    ) -> Path:
        """Writes a checkpoint and removes those no longer kept.

        Args:
            step: >= 0; a checkpoint that exists for it is replaced.
            tensors: groups of named tensors, as `{"policy": model.state_dict()}`; a file `<group>.safetensors` each.
                Names that share one tensor are written once and come back sharing it.
            state: numbers, strings, bools, None, lists and dicts with string keys; tuples come back as lists. Floats
                come back exactly, inf and NaN included.
            files: sub-directories by name, each with the function that fills it. It may return what is known of the files
                in it already; the others are read for their checksums.

        Returns:
            The checkpoint's directory.

        Raises:
            CheckpointError: the disk is full or a file cannot be written; what was begun is removed, and the previous
                checkpoint, which the message names, is as it was.
            TypeError: something in `state` that JSON cannot hold, with its path.
        """
        final = self.directory / f"step-{step:06d}"
        temporary = self.directory / f"{final.name}.tmp-{os.getpid()}"
        for name in (*tensors, *(files or {})):
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(f"name of a group or sub-directory: expected letters, digits, - and _, got {name!r}")
        text = json.dumps(_encode(state, "state"), indent=1, allow_nan=False)
        safetensors = extra("safetensors")
        try:
            self._clean()
            sequence = 1 + max((_sequence(path) for path in self._candidates()), default=0)
            temporary.mkdir(parents=True)
            aliases = {}
            for group, named in tensors.items():
                unique, aliases[group] = _untied(named)
                _save_file(unique, temporary / f"{group}.safetensors")
            _write(temporary / STATE, text)
            known: dict[str, tuple[int, int]] = {}
            for name, fill in (files or {}).items():
                (temporary / name).mkdir()
                known |= {f"{name}/{file}": what for file, what in (fill(temporary / name) or {}).items()}
            manifest = {"step": step, "sequence": sequence, "aliases": aliases, "files": _checksums(temporary, known)}
            _write(temporary / MANIFEST, json.dumps(manifest, indent=1))
            _flush(temporary)
            self._publish(temporary, final)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, (OSError, safetensors.SafetensorError, CheckpointError)):
                raise CheckpointError(self._failure(step, error)) from error
            raise
        self._verified.add((final, sequence))
        self._prune()
        return final

    def latest(self, check: Check | None = None) -> Path | None:
        """The checkpoint saved last of those that are complete and undamaged; warns about each one that is not.

        Args:
            check: `check_files`, or what does its work.
        """
        order = {path: _sequence(path) for path in self._candidates()}
        for path in sorted(order, key=lambda p: order[p] if order[p] > 0 else math.inf, reverse=True):
            problem = self._verify(path, check)
            if problem is None:
                return path
            warnings.warn(f"checkpoint {path} is skipped: {problem}", stacklevel=2)
        return None

    def load(
        self, path: Path | str, check: Check | None = None
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:  # fmt: skip
        """The tensors, on the CPU, and the state of a checkpoint.

        Args:
            check: `check_files`, or what does its work.

        Raises:
            CheckpointError: it is not there, not complete, or damaged; with the file.
        """
        path = Path(path)
        problem = self._verify(path, check)
        if problem is not None:
            raise CheckpointError(f"checkpoint {path}: {problem}")
        load_file = extra("safetensors.torch").load_file
        tensors = {}
        for group, aliases in _manifest(path)["aliases"].items():
            tensors[group] = load_file(path / f"{group}.safetensors")
            tensors[group] |= {alias: tensors[group][name] for alias, name in aliases.items()}
        return tensors, _decode(json.loads((path / STATE).read_text(encoding="utf-8")))

    def _candidates(self) -> list[Path]:
        """What carries the name of a checkpoint; one being replaced counts where its successor is not there."""
        if not self.directory.is_dir():
            return []
        names = {p.name for p in self.directory.iterdir() if _NAME.fullmatch(p.name)}
        return [self.directory / n for n in sorted(names) if not (n.endswith(".replaced") and n[:-9] in names)]

    def _verify(self, path: Path, check: Check | None) -> str | None:
        """What is wrong with a checkpoint, or None; each is read through once."""
        try:
            manifest = _manifest(path)
            if (path, manifest["sequence"]) in self._verified:
                return None
            if problem := (check or check_files)(path, manifest["files"]):
                return problem
        except OSError as error:
            return _reason(path, error)
        except (ValueError, KeyError, TypeError):
            return f"{MANIFEST} is damaged"
        self._verified.add((path, manifest["sequence"]))
        return None

    def _publish(self, temporary: Path, final: Path) -> None:
        pointer = self.directory / f"{LATEST}.tmp-{os.getpid()}"
        replaced = final.with_name(final.name + ".replaced")
        try:
            _write(pointer, final.name + "\n")
            _flush_file(pointer)
            if final.exists():
                os.rename(final, replaced)
            os.rename(temporary, final)
            os.replace(pointer, self.directory / LATEST)
            _flush_file(self.directory)
        except OSError:
            pointer.unlink(missing_ok=True)
            raise
        shutil.rmtree(replaced, ignore_errors=True)

    def _clean(self) -> None:
        """Removes what killed saves left."""
        if not self.directory.is_dir():
            return
        kept = {path.name for path in self._candidates()}
        for path in self.directory.iterdir():
            if _LEFTOVER.fullmatch(path.name) or (path.name.endswith(".replaced") and path.name not in kept):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _prune(self) -> None:
        if self.keep is None:
            return
        for path in sorted(self._candidates(), key=_sequence)[: -self.keep]:
            step = int(_NAME.fullmatch(path.name).group(1))  # type: ignore[union-attr]
            if self.keep_every is not None and step % self.keep_every == 0:
                continue
            try:
                _remove(path)
            except OSError as error:
                warnings.warn(f"checkpoint {path} could not be removed: {error.strerror}", stacklevel=3)

    def _failure(self, step: int, error: BaseException) -> str:
        reason = str(error)
        if isinstance(error, OSError) and error.strerror:
            reason = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            previous = self.latest()
        kept = f"the previous checkpoint {previous} is intact" if previous else "there is no earlier checkpoint"
        return f"checkpoint of step {step} in {self.directory} could not be saved: {reason}; {kept}"


def check_files(path: Path, files: Files) -> str | None:
    """What is wrong with files of a checkpoint, or None; each is read through."""
    try:
        for name, (size, crc) in files.items():
            file = path / name
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes, expected {size}"
            if checksum(file) != crc:
                return f"{name} is damaged: its checksum differs"
    except OSError as error:
        return _reason(path, error)
    return None


def _reason(path: Path, error: OSError) -> str:
    return f"{Path(error.filename).name if error.filename else path}: {error.strerror}"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _save_file(tensors: dict[str, Tensor], path: Path) -> None:
    extra("safetensors.torch").save_file(tensors, path)


def _remove(path: Path) -> None:
    """Takes the name away first: half a checkpoint never looks like one."""
    aside = path.with_name(f"{path.name.partition('.')[0]}.tmp-{os.getpid()}")
    os.rename(path, aside)
    shutil.rmtree(aside)


def _untied(named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors that share no memory, and which names are the same tensor under another name."""
    unique: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    storages: set[int] = set()
    for name, tensor in named.items():
        tensor = tensor.detach()
        same = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        if tensor.numel() and same in first:
            aliases[name] = first[same]
            continue
        first[same] = name
        storage = tensor.untyped_storage().data_ptr()
        overlaps = storage in storages and tensor.numel() > 0
        storages.add(storage)
        unique[name] = tensor.clone(memory_format=torch.contiguous_format) if overlaps else tensor.contiguous()
    return unique, aliases


def _manifest(path: Path) -> Any:
    return json.loads((path / MANIFEST).read_text(encoding="utf-8"))


def _sequence(path: Path) -> int:
    """The how many-th save it was: steps may go back when a run is continued from an earlier one."""
    try:
        return int(_manifest(path)["sequence"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


def _files(directory: Path) -> list[Path]:
    return sorted(p for p in directory.rglob("*") if p.is_file())


def _checksums(directory: Path, known: Files) -> dict[str, tuple[int, int]]:
    names = {p.relative_to(directory).as_posix(): p for p in _files(directory)}
    return {name: known.get(name) or (p.stat().st_size, checksum(p)) for name, p in names.items()}


def checksum(file: Path) -> int:
    """The CRC-32 of what is in a file."""
    crc = 0
    with file.open("rb") as stream:
        while block := stream.read(2**22):
            crc = zlib.crc32(block, crc)
    return crc


def _flush(directory: Path) -> None:
    for path in [*_files(directory), *(p for p in directory.rglob("*") if p.is_dir()), directory]:
        _flush_file(path)


def _flush_file(path: Path) -> None:
    """Of a file or of a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _encode(value: Any, path: str) -> Any:
    """What JSON holds, with the floats it has no words for."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {_FLOAT: repr(float(value))}
    if isinstance(value, (list, tuple)):
        return [_encode(v, f"{path}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str) or name == _FLOAT:
                raise TypeError(f"{path}: expected keys that are strings, got {name!r}")
        return {name: _encode(v, f"{path}.{name}") for name, v in value.items()}
    raise TypeError(f"{path}: expected a number, string, bool, None, list or dict, got {type(value).__name__}")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(v) for v in value]
    if isinstance(value, dict):
        return float(value[_FLOAT]) if _FLOAT in value else {name: _decode(v) for name, v in value.items()}
    return value
