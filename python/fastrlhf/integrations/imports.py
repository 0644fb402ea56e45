"""Calls back when a module has been imported."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

Callback = Callable[[ModuleType], None]


class _Loader(importlib.abc.Loader):
    """The module's own loader, then the callbacks."""

    def __init__(self, loader: Any, watch: Watch) -> None:
        self.loader, self.watch = loader, watch

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None:
            spec.loader = self.loader  # nothing of ours stays on the module
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.watch.imported(module)


class Watch(importlib.abc.MetaPathFinder):
    """First on sys.meta_path while there is anything to wait for."""

    def __init__(self) -> None:
        self.callbacks: dict[str, list[Callback]] = {}
        self._looking: set[str] = set()

    def add(self, name: str, callback: Callback) -> None:
        self.callbacks.setdefault(name, []).append(callback)
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def remove(self, callback: Callback) -> None:
        for name in list(self.callbacks):
            self.callbacks[name] = [c for c in self.callbacks[name] if c is not callback]
            self._leave(name)

    def imported(self, module: ModuleType) -> None:
        for callback in self.callbacks.pop(module.__name__, []):
            callback(module)
        self._leave(module.__name__)

    def _leave(self, name: str) -> None:
        if not self.callbacks.get(name):
            self.callbacks.pop(name, None)
        if not self.callbacks and self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.callbacks or fullname in self._looking:
            return None
        self._looking.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._looking.discard(fullname)
        if spec is None or spec.loader is None or not hasattr(spec.loader, "exec_module"):
            return None
        spec.loader = _Loader(spec.loader, self)
        return spec


watch = Watch()
