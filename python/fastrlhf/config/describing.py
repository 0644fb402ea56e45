"""A configuration class as text for --help: every key, its type, default and help."""

from __future__ import annotations

import textwrap
import typing
from collections.abc import Mapping
from typing import Any, Literal

from .fields import REQUIRED, Bounds, element, inner, is_dict, is_list, is_section, keys, members, optional
from .values import interval

_WIDTH, _INDENT = 100, 6


def describe(cls: type[Any]) -> str:
    """Every key with its type, bounds, default and help, grouped by section in the order of the class."""
    blocks: list[str] = []
    _section(cls, "", (cls.__doc__ or "").strip() if not _generated(cls) else "", {}, blocks)
    return "\n\n".join(blocks)


def _generated(cls: type[Any]) -> bool:
    """Whether the docstring is the signature that dataclass writes."""
    return (cls.__doc__ or "").startswith(f"{cls.__name__}(")


def _section(cls: type[Any], prefix: str, help: str, defaults: Mapping[str, Any], blocks: list[str]) -> None:
    title = prefix[:-1] or "options"
    place = len(blocks)
    lines = [f"{title}: {help}" if help else title]
    for key in keys(cls):
        kind, path = inner(key.type), prefix + key.name
        if is_section(kind):
            _section(kind, path + ".", key.help, key.section_defaults or {}, blocks)
            continue
        default = defaults[key.name] if key.name in defaults else key.make_default()
        lines.append(f"  --{path} {kind_of(key.type, key.bounds)}{_limits(key.bounds)}  [{_default(default)}]")
        lines += textwrap.wrap(key.help, _WIDTH, initial_indent=" " * _INDENT, subsequent_indent=" " * _INDENT)
        if is_list(kind) and is_section(element(kind)):
            _section(element(kind), f"{path}.N.", f"entry N of {path}, from 0", {}, blocks)
    if len(lines) > 1:
        blocks.insert(place, "\n".join(lines))


def kind_of(type_: Any, bounds: Bounds = Bounds()) -> str:
    """A type in a word."""
    if optional(type_):
        return kind_of(inner(type_), bounds) + "|null"
    if len(members(type_)) > 1:
        return "|".join(kind_of(m) for m in members(type_))
    if is_list(type_):
        return f"list of {kind_of(element(type_), bounds)}"
    if is_dict(type_):
        return f"names to {kind_of(element(type_), bounds)}"
    if typing.get_origin(type_) is Literal:
        return "{" + ",".join(str(a) for a in typing.get_args(type_)) + "}"
    if bounds.choices is not None:
        return "{" + ",".join(str(c) for c in bounds.choices) + "}"
    return str(getattr(type_, "__name__", type_))


def _limits(bounds: Bounds) -> str:
    return f" {interval(bounds)}" if interval(bounds) else ""


def _default(value: Any) -> str:
    if value is REQUIRED:
        return "required"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, list) and not any(isinstance(v, (list, dict)) or hasattr(v, "__dict__") for v in value):
        return ",".join(_default(v) for v in value) or "empty"
    if isinstance(value, (list, dict)):
        return f"{len(value)} entries" if value else "empty"
    return str(value) if value != "" else '""'
