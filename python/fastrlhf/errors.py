"""Errors that a user can act on. The command line prints them in one line, without a traceback, and exits with 2."""

from __future__ import annotations

from types import ModuleType


class UserError(Exception):
    """What was asked for cannot be done; the message says what came, where, and what was expected."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot be used; names the key by its full dotted path and where its value came from."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that could not be written, read or applied; nothing was changed by the attempt."""


class MissingExtra(UserError, ImportError):
    """A package that an optional part of fastrlhf needs and that is not installed."""


def extra(module: str, name: str = "train") -> ModuleType:
    """Imports a package that belongs to the optional dependencies `name`."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtra(f"{package}: not usable here ({error}); it comes with pip install 'fastrlhf[{name}]'") from error
