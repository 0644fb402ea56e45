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

    def __getattr__(self, name: str) -> Any:
        """What runpy, inspect and importlib.resources ask a loader for: code, source, data."""
        return getattr(self.loader, name)

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
        self._found: set[str] = set()

    def add(self, name: str, callback: Callback) -> None:
        self.callbacks.setdefault(name, []).append(callback)
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def remove(self, callback: Callback | None) -> None:
        for name in list(self.callbacks):
            self.callbacks[name] = [c for c in self.callbacks[name] if c is not callback]
            self._leave(name)

    def follows(self, name: str) -> bool:
        """Whether a module that is being imported was found by this finder: the import began after `add`."""
        return name in self._found

    def imported(self, module: ModuleType) -> None:
        self._found.discard(module.__name__)
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
        self._found.add(fullname)
        return spec


watch = Watch()


def exists(name: str) -> bool:
    """Whether there is such a module, as far as can be told without importing the packages that it is in."""
    path: Sequence[str] | None = None
    parts = name.split(".")
    for i in range(len(parts)):
        part = ".".join(parts[: i + 1])
        if part in sys.modules:
            path = getattr(sys.modules[part], "__path__", None)
            continue
        spec = importlib.util.find_spec(part) if i == 0 else importlib.machinery.PathFinder.find_spec(part, path)
        if spec is None:
            return False
        path = spec.submodule_search_locations
    return True
