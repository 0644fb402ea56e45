"""fastrlhf under other frameworks: their functions replaced by ours, seam by seam, each compared with theirs first."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from .imports import Callback, watch
from .report import Report, Status

HOSTS = ("trl", "verl", "openrlhf", "nemo_rl", "slime")

__all__ = ["HOSTS", "Report", "Status", "host", "install", "patch", "unpatch"]


_following: dict[str, Callback] = {}  # hosts that are not imported yet; nothing here imports torch


def host(name: str) -> Any:
    """The `Host` of this name: its seams and the versions they were tested with."""
    _check(name)
    return importlib.import_module(f"fastrlhf.integrations.hosts.{name}").HOST


def _check(name: str) -> None:
    if name not in HOSTS:
        raise ValueError(f"host: must be one of {HOSTS}, got {name!r}")


def patch(name: str, *, quiet: bool = False) -> Report:
    """Replaces a framework's functions by ours, in this process.

    Each seam is compared with the host's own function first, on small inputs on the CPU with interior gaps in the masks,
    clamps, dtypes and gradients, and goes live only if results, dtypes, gradients and errors agree. Seams in modules that are
    costly to import or need what is not installed wait until the host imports them. A second call changes nothing.

    Args:
        name: "trl", "verl", "openrlhf", "nemo_rl" or "slime".
        quiet: do not print the report to stderr.

    Returns:
        A `Report`: for every seam whether it is live, and if not, why.

    Raises:
        ValueError: an unknown name.
    """
    from .patching import apply

    report = apply(host(name), eager=True)
    if not quiet:
        print(report, file=sys.stderr)
    return report


def unpatch(name: str | None = None) -> list[Report]:
    """Puts back every function of a host (None: of all hosts), in every loaded module that holds ours by a name of its own, and
    stops waiting for its imports. Returns a report each."""
    from .patching import remove

    names = HOSTS if name is None else (name,)
    for n in names:
        watch.remove(_following.pop(n, None))
    return [remove(host(n)) for n in names]


def install(names: str | None = None) -> None:
    """Patches frameworks when they are imported, without importing them. `import fastrlhf` does it where FASTRLHF_PATCH is set.

    Args:
        names: comma-separated; None takes the environment variable FASTRLHF_PATCH.

    Raises:
        ValueError: an unknown name.
    """
    given = os.environ.get("FASTRLHF_PATCH", "") if names is None else names
    wanted = [n for n in map(str.strip, given.split(",")) if n]
    for name in wanted:
        _check(name)
    for name in wanted:
        _follow(name)


def _follow(name: str) -> None:
    def when_imported(_: Any) -> None:
        from .patching import apply, log

        _following.pop(name, None)
        log(str(apply(host(name), eager=False)))

    if name in sys.modules:
        when_imported(None)
    elif name not in _following:
        _following[name] = when_imported
        watch.add(name, when_imported)
