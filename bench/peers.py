"""The functions people use today, where they are installed."""

from __future__ import annotations

import importlib
from typing import Any


def find(module: str, name: str) -> Any | None:
    try:
        return getattr(importlib.import_module(module), name)
    except Exception:
        return None


def trl(name: str) -> Any | None:
    return find("trl.trainer.utils", name)


def verl_functional(name: str) -> Any | None:
    return find("verl.utils.torch_functional", name)


def verl_algorithm(name: str) -> Any | None:
    return find("verl.trainer.ppo.core_algos", name)


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    out = {}
    for name in ("torch", "trl", "verl", "numpy"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "not installed"
    return out
