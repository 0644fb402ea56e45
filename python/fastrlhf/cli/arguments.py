"""What every command with a typed configuration does with its arguments: --help, --config, and errors in one line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from ..config import describe, load
from ..errors import ConfigError, UserError

C = TypeVar("C")


def arguments(command: str, cls: type[C], argv: Sequence[str], *, repeated: Sequence[str] = ()) -> C | None:
    """The configuration that the arguments of a command give, or None where they asked for --help, which is printed.

    repeated: lists of text that the command line gives one entry an option, each as it stands, commas and all.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(usage(command, cls))
        return None
    words, file, lists = _taken(list(argv), repeated)
    config = load(cls, file, words)
    for name, entries in lists.items():
        setattr(config, name, entries)
    return config


def usage(command: str, cls: type[C]) -> str:
    return f"usage: fastrlhf {command} [--config FILE.yaml] [--key value | --section.key value]...\n\n{describe(cls)}"


@contextmanager
def user_errors() -> Iterator[None]:
    """Around what reads a user's files and arguments: its errors, which name the file or argument, as UserError."""
    try:
        yield
    except (UserError, BrokenPipeError):
        raise
    except (ValueError, OSError, ImportError) as error:
        raise UserError(str(error)) from error


def _taken(words: list[str], repeated: Sequence[str]) -> tuple[list[str], Path | None, dict[str, list[str]]]:
    """(the other words, the file of --config, the entries of each repeated option)."""
    rest: list[str] = []
    taken: dict[str, list[str]] = {}
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        key = name.removeprefix("--").replace("-", "_")
        if not name.startswith("--") or key not in ("config", *repeated):
            rest.append(word)
            continue
        if not equals:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"{key}: expected {'a file' if key == 'config' else 'text'}, got no value (command line)")
            value = words.pop(0)
        taken.setdefault(key, []).append(value)
    files = taken.pop("config", [])
    if len(files) > 1:
        raise ConfigError(f"config: expected one file, got {', '.join(files)}")
    return rest, Path(files[0]) if files else None, taken
