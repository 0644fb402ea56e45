"""What a configuration consists of: options with help and bounds, sections of options."""

from __future__ import annotations

import copy
import dataclasses
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union


class _Required:
    """The default of an option that has none."""

    def __repr__(self) -> str:
        return "REQUIRED"

    def __copy__(self) -> _Required:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> _Required:
        return self

    def __reduce__(self) -> str:
        return "REQUIRED"


REQUIRED: Any = _Required()
_KEY = "fastrlhf"


@dataclass(frozen=True)
class Bounds:
    """What a value, or each element of a list or dict, must satisfy beyond its type."""

    choices: tuple[Any, ...] | None = None
    low: float | None = None
    high: float | None = None
    above: float | None = None


@dataclass(frozen=True)
class Key:
    """One field of a configuration class."""

    name: str
    type: Any
    help: str
    bounds: Bounds
    make_default: Callable[[], Any]
    section_defaults: Mapping[str, Any] | None
    """What a section's options default to here, where that differs from its class."""


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
) -> Any:
    """A dataclass field that holds one value, a list or a dict.

    Args:
        default: REQUIRED for none. A list, dict or dataclass is copied for each configuration.
        help: one or two sentences with the unit; printed by `describe`.
        choices: the values allowed.  low, high: inclusive bounds.  above: an exclusive lower bound. Of a list or dict,
            they hold for each element; None always passes where the type allows it.
    """
    metadata = {_KEY: (help, Bounds(None if choices is None else tuple(choices), low, high, above), None)}
    if isinstance(default, (list, dict)) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(cls: type[Any], help: str, **defaults: Any) -> Any:
    """A dataclass field that holds a nested configuration of class `cls`.

    Args:
        help: what the section is about; printed as its heading by `describe`.
        defaults: options of the section whose default differs here from the one in its class.
    """
    names = {f.name for f in dataclasses.fields(cls)}
    for name in defaults:
        if name not in names:
            raise TypeError(f"section: {cls.__name__} has no option {name!r}")
    return dataclasses.field(
        default_factory=lambda: cls(**copy.deepcopy(defaults)), metadata={_KEY: (help, Bounds(), defaults)}
    )


def keys(cls: type[Any]) -> list[Key]:
    """The fields of a configuration class that can be set, with their types resolved."""
    hints = typing.get_type_hints(cls)
    found = []
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        help, bounds, defaults = field.metadata.get(_KEY, ("", Bounds(), None))
        found.append(Key(field.name, hints[field.name], help, bounds, _maker(field), defaults))
    return found


def _maker(field: dataclasses.Field[Any]) -> Callable[[], Any]:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory
    default = REQUIRED if field.default is dataclasses.MISSING else field.default
    return lambda: default


def is_section(type_: Any) -> bool:
    return isinstance(type_, type) and dataclasses.is_dataclass(type_)


def members(type_: Any) -> tuple[Any, ...]:
    """The alternatives of a union, one for any other type; `None` is written as NoneType."""
    if typing.get_origin(type_) in (Union, types.UnionType):
        return typing.get_args(type_)
    return (type_,)


def optional(type_: Any) -> bool:
    return type(None) in members(type_)


def inner(type_: Any) -> Any:
    """A type without its None."""
    rest = [t for t in members(type_) if t is not type(None)]
    return rest[0] if len(rest) == 1 else type_


def element(type_: Any) -> Any:
    """What a list or dict holds; None for other types."""
    origin, arguments = typing.get_origin(inner(type_)), typing.get_args(inner(type_))
    if origin is list:
        return arguments[0]
    if origin is dict:
        return arguments[1]
    return None


def is_list(type_: Any) -> bool:
    return typing.get_origin(inner(type_)) is list


def is_dict(type_: Any) -> bool:
    return typing.get_origin(inner(type_)) is dict


def paths(cls: type[Any], prefix: str = "") -> Iterator[str]:
    """Every dotted path that can be set; N stands for an index of a list of sections."""
    for key in keys(cls):
        path = prefix + key.name
        kind = inner(key.type)
        if is_section(kind):
            yield from paths(kind, path + ".")
            continue
        yield path
        if is_list(kind) and is_section(element(kind)):
            yield from paths(element(kind), path + ".N.")
