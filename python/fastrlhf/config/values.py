"""One value: from YAML or from the command line's text to the type a configuration declares."""

from __future__ import annotations

import math
import typing
from collections.abc import Callable
from typing import Any, Literal

from ..errors import ConfigError, extra
from .fields import Bounds, element, inner, is_dict, is_list, is_section, members, optional

TRUE, FALSE, NONE = ("true", "yes", "on", "1"), ("false", "no", "off", "0"), ("null", "none", "~")


class _Unfit(Exception):
    """A value that is not of the type; which message to give is the caller's to know."""


def convert(type_: Any, value: Any, bounds: Bounds, path: str, where: Callable[[str], str]) -> Any:
    """A value as YAML gives it, as an instance of a type that contains no section.

    Raises:
        ConfigError: naming the key, what came, what was expected, and `where(key)` it came from.
    """
    if is_list(type_) and isinstance(value, list):
        return [convert(element(type_), v, bounds, f"{path}.{i}", where) for i, v in enumerate(value)]
    if is_dict(type_) and isinstance(value, dict):
        for name in value:
            if not isinstance(name, str):
                raise ConfigError(f"{path}: expected keys that are strings, got {name!r} ({where(path)})")
        return {name: convert(element(type_), v, bounds, f"{path}.{name}", where) for name, v in value.items()}
    if value is None and optional(type_):
        return None
    for member in members(type_):
        try:
            result = _scalar(member, value)
        except _Unfit:
            continue
        _check(result, bounds, path, where(path))
        return result
    raise ConfigError(f"{path}: expected {expected(type_)}, got {shown(value)} ({where(path)})")


def parse(type_: Any, text: str, path: str, where: str) -> Any:
    """A command-line word as YAML would give it for this type; `convert` checks it."""
    kind = inner(type_)
    if optional(type_) and text.lower() in NONE:
        return None
    if is_section(kind) or is_dict(kind) or (is_list(kind) and (text.lstrip().startswith("[") or is_section(element(kind)))):
        yaml = extra("yaml")
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"{path}: expected {expected(type_)} written as YAML, got {text!r} ({where})") from None
    if is_list(kind):
        return [parse(element(kind), word.strip(), path, where) for word in text.split(",") if word.strip()]
    if kind is bool:
        return {**dict.fromkeys(TRUE, True), **dict.fromkeys(FALSE, False)}.get(text.lower(), text)
    return text


def expected(type_: Any) -> str:
    """A type in words."""
    if len(members(type_)) > 1:
        return " or ".join("null" if m is type(None) else expected(m) for m in members(type_))
    if typing.get_origin(type_) is Literal:
        return "one of " + ", ".join(repr(a) for a in typing.get_args(type_))
    if is_list(type_):
        return "a list, each element " + expected(element(type_))
    if is_dict(type_):
        return "a mapping of names, each value " + expected(element(type_))
    if is_section(type_):
        return f"a mapping with the options of {type_.__name__}"
    names = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string"}
    return names.get(type_, str(type_))


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _scalar(type_: Any, value: Any) -> Any:
    if typing.get_origin(type_) is Literal:
        for choice in typing.get_args(type_):
            if (type(choice) is type(value) and choice == value) or (not isinstance(choice, str) and str(choice) == value):
                return choice
    elif type_ is bool:
        if isinstance(value, bool):
            return value
    elif type_ is int:
        number = _number(value)
        if number.is_integer():
            return value if isinstance(value, int) else int(value) if _plain_integer(value) else int(number)
    elif type_ is float:
        return _number(value)
    elif type_ is str and isinstance(value, str):
        return value
    raise _Unfit


def _plain_integer(value: Any) -> bool:
    return isinstance(value, str) and value.strip().lstrip("+-").isdigit()


def _number(value: Any) -> float:
    """YAML 1.1 reads 1e-5 as a string."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise _Unfit
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise _Unfit from None
    if not math.isfinite(number):
        raise _Unfit
    return number


def _check(value: Any, bounds: Bounds, path: str, where: str) -> None:
    if bounds.choices is not None and value not in bounds.choices:
        options = ", ".join(repr(c) for c in bounds.choices)
        raise ConfigError(f"{path}: expected one of {options}, got {value!r} ({where})")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if (
        (bounds.low is not None and value < bounds.low)
        or (bounds.high is not None and value > bounds.high)
        or (bounds.above is not None and value <= bounds.above)
    ):
        raise ConfigError(f"{path}: expected a number {interval(bounds)}, got {value} ({where})")


def interval(bounds: Bounds) -> str:
    """Bounds in signs: `>= 0`, `in (0, 1]`; empty without bounds."""
    opening, low = ("(", bounds.above) if bounds.above is not None else ("[", bounds.low)
    if low is None:
        return "" if bounds.high is None else f"<= {bounds.high:g}"
    if bounds.high is None:
        return f"{'>' if opening == '(' else '>='} {low:g}"
    return f"in {opening}{low:g}, {bounds.high:g}]"
