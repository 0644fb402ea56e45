"""Libraries that only some calls need, imported when they do."""

from __future__ import annotations

import importlib
from typing import Any


def library(name: str, purpose: str) -> Any:
    """The module `name`; where it is not installed, ModuleNotFoundError that says what wanted it and how to get it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != name.split(".")[0]:
            raise
        raise ModuleNotFoundError(f"{purpose} needs {name}: pip install 'fastrlhf[train]'", name=error.name) from None
