"""Puts replacements where a host keeps its functions, and takes them out again."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import torch

from .agreement import Disagreement, HostFailed, compare
from .imports import Callback, exists, watch
from .report import LIVE, NOT_LIVE, WAITING, Report, Status
from .seam import Entry, Host, Seam, Sizes, logger
from .signatures import mismatch, signature_of

_lock = threading.RLock()
UNKNOWN = "unknown"


class Unavailable(Exception):
    """A seam cannot be served here; the message says why."""


@dataclass
class Place:
    """A name that holds a function: of a module, of a class, or a key of a dict."""

    holder: Any
    key: str
    item: bool = False

    def get(self) -> Any:
        return self.holder.get(self.key) if self.item else vars(self.holder).get(self.key)

    def put(self, value: Any) -> None:
        if self.item:
            self.holder[self.key] = value
        else:
            setattr(self.holder, self.key, value)


@dataclass
class Applied:
    """A seam that is live. `original` None is a registry's entry, which is taken out again."""

    status: Status
    replacement: Any
    original: Any
    places: list[Place]


@dataclass
class State:
    """Of one host in this process."""

    host: Host
    applied: dict[str, Applied] = field(default_factory=dict)
    waiting: dict[str, Callback] = field(default_factory=dict)
    comparing: set[str] = field(default_factory=set)


_states: dict[str, State] = {}


def host_version(host: Host) -> str | None:
    """The installed version; None where the host cannot be imported."""
    if host.package not in sys.modules and importlib.util.find_spec(host.package) is None:
        return None
    try:
        return version(host.distribution)
    except PackageNotFoundError:
        return str(getattr(sys.modules.get(host.package), "__version__", UNKNOWN))


def is_tested(host: Host, found: str | None) -> bool:
    """Whether a version lies in the tested range, compared by its first two numbers."""
    return found is not None and _numbers(host.tested[0]) <= _numbers(found) <= _numbers(host.tested[1])


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.split(".")[:2]
    return tuple(int(p) if p.isdigit() else -1 for p in parts)


def apply(host: Host, *, eager: bool) -> Report:
    """Makes live what can be; idempotent. `eager` imports the modules of the host that are not marked `on_import`."""
    found = host_version(host)
    if found == UNKNOWN and eager:
        importlib.import_module(host.package)
        found = host_version(host)
    known = is_tested(host, found)
    report = Report(host.name, found, host.tested, known)
    with _lock:
        state = _states.setdefault(host.name, State(host))
    for seam in host.seams:
        if found is None:
            report.seams.append(Status(seam.name, seam.op, NOT_LIVE, f"{host.package} is not installed"))
        else:
            report.seams.append(_apply_or_wait(state, seam, known, eager and not seam.on_import))
    return report


def _apply_or_wait(state: State, seam: Seam | Entry, known: bool, eager: bool) -> Status:
    """Nothing is imported or compared under the lock: an import in another thread may wait for it to call back."""
    if seam.name in state.applied:
        return state.applied[seam.name].status
    module = _imported(seam.module)
    if module is None and eager and seam.module not in sys.modules:
        try:
            module = importlib.import_module(seam.module)
        except Exception as error:
            return Status(seam.name, seam.op, NOT_LIVE, f"{seam.module} cannot be imported: {type(error).__name__}: {error}")
    if module is None and not exists(seam.module):
        return Status(seam.name, seam.op, NOT_LIVE, f"there is no module {seam.module}")
    if module is None:
        _wait(state, seam, known)
        module = _imported(seam.module)  # while that was done
        if module is None:
            if seam.module in sys.modules and not watch.follows(seam.module):
                _stop_waiting(state, seam)
                return Status(seam.name, seam.op, NOT_LIVE, f"{seam.module} is being imported: call patch again afterwards")
            return Status(seam.name, seam.op, WAITING, f"until {seam.module} is imported")
        _stop_waiting(state, seam)
    return _apply(state, seam, module, known)


def _imported(name: str) -> ModuleType | None:
    """A module whose import has ended."""
    module = sys.modules.get(name)
    return None if module is None or getattr(module.__spec__, "_initializing", False) else module


def _wait(state: State, seam: Seam | Entry, known: bool) -> None:
    def when_imported(module: ModuleType) -> None:
        state.waiting.pop(seam.name, None)
        status = _apply(state, seam, module, known)
        log(f"{status.seam}: {status.state}{'; ' + status.note if status.note else ''}")

    with _lock:
        if seam.name not in state.waiting:
            state.waiting[seam.name] = when_imported
            watch.add(seam.module, when_imported)


def _stop_waiting(state: State, seam: Seam | Entry) -> None:
    with _lock:
        callback = state.waiting.pop(seam.name, None)
        if callback is not None:
            watch.remove(callback)


def _apply(state: State, seam: Seam | Entry, module: ModuleType, known: bool) -> Status:
    with _lock:
        if seam.name in state.applied:
            return state.applied[seam.name].status
        if seam.name in state.comparing:
            return Status(seam.name, seam.op, WAITING, "for another thread, which compares it")
        state.comparing.add(seam.name)
    try:
        applied = _compared(state.host, seam, module, known)
        with _lock:
            if _states.get(state.host.name) is not state:
                return Status(seam.name, seam.op, NOT_LIVE, "unpatched meanwhile")
            for place in applied.places:
                place.put(applied.replacement)
            state.applied[seam.name] = applied
        return applied.status
    except (Unavailable, Disagreement) as error:
        return Status(seam.name, seam.op, NOT_LIVE, str(error))
    except Exception as error:  # a host that changed may break anything here: it keeps its own function
        logger.debug("%s", seam.name, exc_info=True)
        return Status(seam.name, seam.op, NOT_LIVE, f"{type(error).__name__}: {error}")
    finally:
        state.comparing.discard(seam.name)


def require_op(op: str) -> None:
    """Raises `Unavailable` where this build has no such operation."""
    from .. import ops

    if not hasattr(ops, op):
        raise Unavailable(f"{op} is not in this build")


def find(seam: Seam | Entry, module: ModuleType) -> tuple[Place, Any]:
    """Where a seam is, and the host's own function: what is there, or for a new entry the one `like` it, or None."""
    if isinstance(seam, Entry):
        registry = vars(module).get(seam.registry)
        if not isinstance(registry, dict):
            raise Unavailable(f"{seam.module} has no dict {seam.registry}")
        if seam.key in registry:
            raise Unavailable(f"{seam.registry} has {seam.key!r} already")
        return Place(registry, seam.key, item=True), _hosts_own(registry.get(seam.like))
    *path, key = seam.attribute.split(".")
    holder: Any = module
    for part in path:
        holder = vars(holder).get(part)
        if holder is None:
            raise Unavailable(f"{seam.module} has no {part}")
    value = vars(holder).get(key)
    if value is None:
        raise Unavailable(f"{seam.module} has no {seam.attribute}")
    return Place(holder, key), value


def _hosts_own(function: Any) -> Any:
    return function.__wrapped__ if getattr(function, "__fastrlhf__", False) else function


def build(seam: Seam | Entry, original: Any) -> Any:
    """The replacement; raises `Unavailable` where it does not take every argument that the host's function takes."""
    replacement = seam.build(original)
    try:
        theirs = signature_of(seam.called(original))
    except (TypeError, ValueError):  # a builtin, which shows none
        return replacement
    if found := mismatch(theirs, signature_of(replacement, own=True)):
        raise Unavailable(f"the host's takes {found}")
    return replacement


def uncompared(seam: Seam | Entry, original: Any) -> str:
    """Why a seam cannot be compared with the host's function here; empty if it can."""
    if seam.calls is None:
        return seam.unverified
    return f"{seam.module} has no {seam.like!r} in {seam.registry}" if isinstance(seam, Entry) and original is None else ""


def _compared(host: Host, seam: Seam | Entry, module: ModuleType, known: bool) -> Applied:
    """A seam that may go live."""
    require_op(seam.op)
    place, original = find(seam, module)
    if getattr(original, "__fastrlhf__", False):
        raise Unavailable("patched by another copy of fastrlhf")
    replacement = build(seam, original)
    error, note = None, "a new name" if isinstance(seam, Entry) else ""
    if reason := uncompared(seam, original):
        if not known:
            raise Unavailable(f"cannot be compared with the host's function here ({reason}), and the version is not tested")
        note = ", ".join(filter(None, [note, f"not compared: {reason}"]))
    else:
        error = verified(seam, original, replacement)
    places = [place] if isinstance(seam, Entry) else [place, *_others(host, seam, module, original, place)]
    status = Status(seam.name, seam.op, LIVE, note, len(places), error)
    return Applied(status, replacement, None if isinstance(seam, Entry) else original, places)


def devices() -> list[str]:
    """Where seams are compared, in turn: some functions of hosts run on a GPU alone."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def verified(seam: Seam | Entry, original: Any, replacement: Any) -> float:
    """The largest difference in the seam's calls on small inputs on the first device where the host's function runs; of calls
    that neither the host rounds nor ours leaves to it."""
    *others, last = devices()
    for device in others:
        try:
            return _verified(seam, original, replacement, Sizes(device=device))
        except HostFailed:
            continue
    return _verified(seam, original, replacement, Sizes(device=last))


def _verified(seam: Seam | Entry, original: Any, replacement: Any, sizes: Sizes) -> float:
    theirs, ours = seam.pair(original, replacement)
    errors = []
    for call in seam.calls_of(original, sizes):
        found = compare(theirs, ours, call)
        if not found.declined and (call.tolerance or 0) <= 1e-3:
            errors.append(found.error)
    if not errors:
        raise Unavailable("every call is left to the host's own function")
    return max(errors)


def _others(host: Host, seam: Seam, module: ModuleType, value: Any, first: Place) -> Iterator[Place]:
    """The other names of the host that hold a value: modules that imported it by name, registries."""
    if "." not in seam.attribute:
        for loaded in _modules(host):
            for key, held in list(vars(loaded).items()):
                if held is value and not (loaded is first.holder and key == first.key):
                    yield Place(loaded, key)
    for name in seam.registries:
        registry = vars(module).get(name)
        if isinstance(registry, dict):
            for key, held in list(registry.items()):
                if held is value:
                    yield Place(registry, key, item=True)


def _modules(host: Host) -> list[ModuleType]:
    prefix = host.package + "."
    found = [m for n, m in list(sys.modules.items()) if n == host.package or n.startswith(prefix)]
    return [m for m in found if isinstance(m, ModuleType)]


def remove(host: Host) -> Report:
    """Puts back what was there."""
    found = host_version(host)
    report = Report(host.name, found, host.tested, is_tested(host, found))
    with _lock:
        state = _states.pop(host.name, State(host))
        for callback in state.waiting.values():
            watch.remove(callback)
        _find_copies(state.applied.values())
        for applied in reversed(list(state.applied.values())):
            report.seams.append(_restore(applied))
    return report


def _find_copies(live: Iterable[Applied]) -> None:
    """Modules, the host's and others, that imported a replacement by name."""
    held = {id(a.replacement): a for a in live if a.original is not None}
    known = {(id(p.holder), p.key) for a in held.values() for p in a.places}
    for module in [m for m in list(sys.modules.values()) if isinstance(m, ModuleType)]:
        for key, value in list(vars(module).items()):
            if id(value) in held and (id(module), key) not in known:
                held[id(value)].places.append(Place(module, key))


def _restore(applied: Applied) -> Status:
    left = 0
    for place in applied.places:
        if place.get() is not applied.replacement:
            left += 1  # someone else patched over it
        elif applied.original is None:
            del place.holder[place.key]
        else:
            place.put(applied.original)
    note = "the host's own again"
    if left:
        note += f"; {left} name(s) hold a third function, which was left"
    return Status(applied.status.seam, applied.status.op, NOT_LIVE, note)


def log(message: str) -> None:
    """At INFO, where it is seen: hosts set the root logger to WARNING, and some set up no logging at all."""
    parent = logging.getLogger("fastrlhf")
    if parent.level == logging.NOTSET:
        parent.setLevel(logging.INFO)
    if logger.hasHandlers():
        logger.info("%s", message)
    elif logger.isEnabledFor(logging.INFO):
        print(message, file=sys.stderr)
