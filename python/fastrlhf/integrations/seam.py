"""A seam as data: a function of another project, what takes its place, and the calls on which both must agree."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .signatures import signature_of

logger = logging.getLogger("fastrlhf.integrations")
Function = Callable[..., Any]


@dataclass(frozen=True)
class Sizes:
    """What the calls of a seam are made for."""

    rows: int = 3
    length: int = 13
    vocab: int = 67
    hidden: int = 16
    dtype: torch.dtype = torch.float32
    device: str = "cpu"


@dataclass
class Call:
    """One call of a seam.

    Args:
        name: what is special about its input.
        args, kwargs: tensors are cloned for each of the two functions.
        grads: positions of the arguments whose gradients are compared too.
        raises: what both functions must raise.
        tolerance: relative and absolute, over the dtype's own; for results that the host rounds on the way.
        differs: why the host's result is wrong here: ours must be finite, the host's is not looked at.
        lacks: what versions of the host that do not have this raise: then ours must be finite.
        without: arguments that the host's function does not have in the versions that this call is for.
        definition: what the host's function computes, for where it does not run in float64 itself.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    grads: tuple[int, ...] = ()
    raises: type[Exception] | tuple[type[Exception], ...] | None = None
    tolerance: float | None = None
    differs: str | None = None
    lacks: type[Exception] | None = None
    without: tuple[str, ...] = ()
    definition: Callable[..., Any] | None = None


Build = Callable[[Any], Any]
Calls = Callable[[Sizes], Iterable[Call]]


@dataclass(frozen=True)
class Seam:
    """A function (or class, or method) of a host that one of ours takes the place of.

    Args:
        module, attribute: where it is defined; a dot in the attribute leads into a class.
        build: the replacement, given the original.
        calls: on which original and replacement are compared before it goes live; None where the host's function does not
            run without what `unverified` names.
        op: the operation of ours under it.
        registries: attributes of the module that hold the function by value in a dict.
        on_import: patched when the host imports the module; our import of it would cost time or fail.
        unverified: why `calls` is None.
        function: how to call what the attribute holds: ``cls.apply`` of an autograd function, a method of a bare instance.
    """

    module: str
    attribute: str
    build: Build
    calls: Calls | None
    op: str
    registries: tuple[str, ...] = ()
    on_import: bool = False
    unverified: str = ""
    function: Callable[[Any], Function] = lambda held: held

    def calls_of(self, original: Any, sizes: Sizes) -> Iterator[Call]:
        """The calls that this version of the host's function takes."""
        assert self.calls is not None
        return _taken(self.calls(sizes), original)

    def called(self, original: Any) -> Any:
        """What shows how the host calls it."""
        return original

    def pair(self, original: Any, replacement: Any) -> tuple[Function, Function]:
        """Both, as `calls` call them."""
        return self.function(original), self.function(replacement)

    @property
    def name(self) -> str:
        return f"{self.module}.{self.attribute}"


def _taken(calls: Iterable[Call], function: Any) -> Iterator[Call]:
    try:
        signature = signature_of(function)
    except (TypeError, ValueError):  # a builtin
        yield from calls
        return
    for call in calls:
        try:
            signature.bind(*call.args, **call.kwargs)
        except TypeError:
            continue
        if not any(name in signature.parameters for name in call.without):
            yield call


@dataclass(frozen=True)
class Entry:
    """A function of ours under a new name in a host's registry, `module.registry[key]`.

    Args:
        build: the function, given the host's own of that kind (or None).
        like: the key of the host's own function that it is compared with.
        calls: on which both are compared; None where the host has none like it, and `unverified` says so.
        function: how to call the host's as ours is called.
    """

    module: str
    registry: str
    key: str
    build: Build
    op: str
    like: str = ""
    calls: Calls | None = None
    unverified: str = "the host has no such function"
    on_import: bool = False
    function: Callable[[Any], Function] = lambda held: held

    def calls_of(self, original: Any, sizes: Sizes) -> Iterator[Call]:
        assert self.calls is not None
        return _taken(self.calls(sizes), self.called(original))

    def called(self, original: Any) -> Any:
        return self.function(original)

    def pair(self, original: Any, replacement: Any) -> tuple[Function, Function]:
        return self.function(original), replacement

    @property
    def name(self) -> str:
        return f"{self.module}.{self.registry}[{self.key!r}]"


@dataclass(frozen=True)
class Host:
    """A project with seams.

    Args:
        package: as it is imported.
        distribution: as it is installed.
        tested: the first and the last version that the tests or the sources it was written against are of.
    """

    name: str
    package: str
    distribution: str
    tested: tuple[str, str]
    seams: tuple[Seam | Entry, ...]


_declined: set[tuple[str, str]] = set()
_watched: ContextVar[list[str] | None] = ContextVar("declines", default=None)


def decline(seam: str, reason: str) -> None:
    """Says once that a call went to the host's own function, and why."""
    if torch.compiler.is_compiling():
        return
    reasons = _watched.get()
    if reasons is not None:
        reasons.append(reason)
    elif (seam, reason) not in _declined:
        _declined.add((seam, reason))
        logger.warning("%s: the host's own function serves calls with %s", seam, reason)


@contextmanager
def declines() -> Iterator[list[str]]:
    """The reasons of the calls that went to the host's own function meanwhile in this thread, which are not logged."""
    reasons: list[str] = []
    token = _watched.set(reasons)
    try:
        yield reasons
    finally:
        _watched.reset(token)


def obstacle(x: Any, op: str = "logprobs") -> str | None:
    """Why our operations do not take this tensor; None if they do."""
    if type(x) is not Tensor and not isinstance(x, torch.nn.Parameter):
        return f"a {type(x).__name__}"
    if x.device.type not in ("cpu", "cuda"):
        return f"tensors on '{x.device.type}'"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return f"dtype {x.dtype}"
    if x.dtype == torch.float64 and x.device.type != "cpu":
        return "float64 on a GPU"
    if torch.compiler.is_compiling():
        return None
    return _without_kernels(op, x.device)


@functools.cache
def _without_kernels(op: str, device: torch.device) -> str | None:
    from ..ops import backend

    try:
        backend.choose(op, torch.empty(0, device=device), None)
    except (ValueError, ImportError) as error:
        return str(error)
    return None


def in_place_of(original: Any) -> Callable[[Function], Function]:
    """A decorator: the replacement carries the original's name, signature and documentation."""

    def mark(replacement: Function) -> Function:
        # not its attributes: torch.compile keeps the host's own function in one
        wrapped = functools.update_wrapper(replacement, original, updated=())
        wrapped.__fastrlhf__ = True  # type: ignore[attr-defined]
        return wrapped

    return mark
