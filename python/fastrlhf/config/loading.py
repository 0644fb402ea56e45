"""A configuration from a YAML file and command-line overrides, and back."""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ConfigError, extra
from .fields import REQUIRED, Key, element, inner, is_dict, is_list, is_section, keys, optional, paths
from .values import convert, expected, parse, shown

C = TypeVar("C")
COMMAND_LINE = "command line"


def load(cls: type[C], file: Path | str | None = None, overrides: Sequence[str] = ()) -> C:
    """A configuration of class `cls`: its defaults, then the YAML file, then the overrides.

    Args:
        cls: a dataclass of `option`s and `section`s.
        file: YAML; nested mappings as the sections are nested.
        overrides: `--a.b value`, `--a.b=value`, or `--a.b` alone for a bool; hyphens stand for underscores; `null` or
            `none` unset what is optional; a list is `x,y,z` or YAML; `--a.0.b value` reaches into a list of sections,
            the index after the last adding one.

    Raises:
        ConfigError: a key that does not exist (with the nearest that does), a value of another type or outside its
            bounds, a required key without a value, a file that cannot be read; ValueErrors of a dataclass's
            `__post_init__` are reported with the section's path.
    """
    origin = str(file) if file is not None else "default"
    tree = {} if file is None else _read(Path(file))
    _refuse_unknown(cls, cls, tree, "", origin)
    given: set[str] = set()
    for words in _pairs(overrides):
        _override(cls, tree, *words, given)
    return _build(cls, tree, {}, "", lambda path: COMMAND_LINE if _within(path, given) else origin)


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dicts and lists, in the order of the fields; `load` reads them back as they were."""
    return {key.name: _plain(getattr(config, key.name)) for key in keys(type(config))}


def to_yaml(config: Any) -> str:
    """The same as YAML."""
    return str(extra("yaml").safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=120))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value


def _within(path: str, given: set[str]) -> bool:
    return any(path == g or path.startswith(g + ".") for g in given)


# The file


def _read(file: Path) -> dict[str, Any]:
    yaml = extra("yaml")

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined,misc]
        """Refuses a key given twice, of which YAML would take the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[Any] = set()
            for name, _ in node.value:
                if name.tag != "tag:yaml.org,2002:merge" and name.value in seen:
                    raise ConfigError(f"{name.value}: given twice ({file}, line {name.start_mark.line + 1})")
                seen.add(name.value)
            return super().construct_mapping(node, deep)

    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{file}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: expected a mapping of options, got {shown(tree)}")
    return tree


def _refuse_unknown(root: type[Any], cls: type[Any], tree: Any, prefix: str, where: str) -> None:
    """Spelling first: a misspelt key is the likeliest cause of whatever else is wrong."""
    if not isinstance(tree, dict):
        return
    known = {key.name: key for key in keys(cls)}
    for name in list(tree):
        if not isinstance(name, str):
            raise ConfigError(f"{prefix}{name}: expected a string as key, got {name!r}; quote it ({where})")
        key = known.get(name.replace("-", "_"))
        if key is None:
            raise _unknown(root, prefix + name, where)
        if name != key.name:
            if key.name in tree:
                raise ConfigError(f"{prefix}{key.name}: given twice, also as {name} ({where})")
            tree[key.name] = tree.pop(name)
        kind, value = inner(key.type), tree[key.name]
        if is_section(kind):
            _refuse_unknown(root, kind, value, f"{prefix}{key.name}.", where)
        elif is_list(kind) and is_section(element(kind)) and isinstance(value, list):
            for i, item in enumerate(value):
                _refuse_unknown(root, element(kind), item, f"{prefix}{key.name}.{i}.", where)


def _unknown(root: type[Any], path: str, where: str) -> ConfigError:
    near = nearest(path, paths(root))
    return ConfigError(f"{path}: no such option{f'; did you mean {near}?' if near else ''} ({where})")


def nearest(path: str, known: Iterable[str]) -> str | None:
    """The known dotted path most like this one, its last name counting most."""
    parts = path.replace("-", "_").split(".")
    indices = [p for p in parts if p.isdigit()]
    wanted = ".".join("N" if p.isdigit() else p for p in parts)
    every = {p: p for p in known}
    every |= {p + ".": p for p in {q.rpartition(".")[0] for q in every} if p}
    found = difflib.get_close_matches(wanted, list(every), 1, 0.75)
    if not found:  # the right name in the wrong section
        last = wanted.rpartition(".")[2]
        names = {p.rpartition(".")[2]: p for p in reversed(list(every)) if not p.endswith(".")}
        found = [names[name] for name in difflib.get_close_matches(last, list(names), 1, 0.75)]
    if not found:
        return None
    return ".".join(indices.pop(0) if p == "N" and indices else p for p in every[found[0]].split("."))


# The command line


def _pairs(words: Sequence[str]) -> Iterable[tuple[str, str | None]]:
    """(path, text) of each override; no text where an option stands alone."""
    i = 0
    while i < len(words):
        word = words[i]
        i += 1
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"{word}: expected an option, --name value ({COMMAND_LINE})")
        name, equals, text = word[2:].partition("=")
        if equals:
            yield name, text
        elif i < len(words) and not words[i].startswith("--"):
            yield name, words[i]
            i += 1
        else:
            yield name, None


def _override(root: type[Any], tree: dict[str, Any], name: str, text: str | None, given: set[str]) -> None:
    """Puts one override into the tree, making the sections on its way."""
    parts = name.replace("-", "_").split(".")
    cls, node, defaults = root, tree, {}
    i = 0
    while True:
        key = {k.name: k for k in keys(cls)}.get(parts[i])
        if key is None:
            raise _unknown(root, name.replace("-", "_"), COMMAND_LINE)
        path, kind, i = ".".join(parts[: i + 1]), inner(key.type), i + 1
        if i == len(parts):
            break
        if is_section(kind):
            node = _child(node, key.name, path, kind)
            cls, defaults = kind, dict(key.section_defaults or {})
            continue
        if is_dict(kind):  # what follows is one name, dots and hyphens and all
            entry = ".".join(name.split(".")[i:])
            given.add(f"{path}.{entry}")
            node = _container(node, key, defaults, path, dict)
            node[entry] = _parsed(element(kind), text, f"{path}.{entry}")
            return
        if is_list(kind) and is_section(element(kind)):
            node = _item(_container(node, key, defaults, path, list), parts[i], path)
            cls, defaults, i = element(kind), {}, i + 1
            if i == len(parts):
                raise ConfigError(f"{'.'.join(parts)}: name one of its options, or give the whole list ({COMMAND_LINE})")
            continue
        raise _unknown(root, name.replace("-", "_"), COMMAND_LINE)
    given.add(path)
    node[key.name] = _parsed(key.type, text, path)
    if is_section(kind) or (is_list(kind) and is_section(element(kind))):
        holder = node[key.name] if isinstance(node[key.name], list) else [node[key.name]]
        for n, item in enumerate(holder):
            at = f"{path}.{n}." if is_list(kind) else f"{path}."
            _refuse_unknown(root, element(kind) if is_list(kind) else kind, item, at, COMMAND_LINE)


def _parsed(type_: Any, text: str | None, path: str) -> Any:
    if text is None:
        if inner(type_) is not bool:
            raise ConfigError(f"{path}: expected {expected(type_)}, got no value ({COMMAND_LINE})")
        return True
    return parse(type_, text, path, COMMAND_LINE)


def _child(node: dict[str, Any], name: str, path: str, kind: Any) -> dict[str, Any]:
    if node.get(name) is None:
        node[name] = {}
    if not isinstance(node[name], dict):
        raise ConfigError(f"{path}: expected {expected(kind)}, got {shown(node[name])}")
    return node[name]


def _container(node: dict[str, Any], key: Key, defaults: Mapping[str, Any], path: str, shape: type) -> Any:
    """The list or dict at a key, its default where none was given."""
    if node.get(key.name) is None:
        default = defaults[key.name] if key.name in defaults else key.make_default()
        node[key.name] = shape() if default is REQUIRED or default is None else _plain(default)
    if not isinstance(node[key.name], shape):
        raise ConfigError(f"{path}: expected {expected(inner(key.type))}, got {shown(node[key.name])}")
    return node[key.name]


def _item(items: list[Any], index: str, path: str) -> dict[str, Any]:
    if not index.isdigit() or int(index) > len(items):
        raise ConfigError(f"{path}.{index}: expected an index from 0 to {len(items)}, {len(items)} adding one ({COMMAND_LINE})")
    if int(index) == len(items):
        items.append({})
    item = items[int(index)]
    if not isinstance(item, dict):
        raise ConfigError(f"{path}.{index}: expected a mapping, got {shown(item)}")
    return item


# The objects


def _build(cls: type[C], tree: Any, defaults: Mapping[str, Any], prefix: str, where: Callable[[str], str]) -> C:
    """An instance of a configuration class from a tree that knows no unknown keys."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{prefix[:-1]}: expected {expected(cls)}, got {shown(tree)} ({where(prefix[:-1])})")
    arguments: dict[str, Any] = {}
    for key in keys(cls):
        path, kind = prefix + key.name, inner(key.type)
        if is_section(kind) and not (optional(key.type) and tree.get(key.name) is None):
            nested = key.section_defaults or {}
            arguments[key.name] = _build(kind, tree.get(key.name, {}), nested, path + ".", where)
        elif key.name not in tree:
            value = copy.deepcopy(defaults[key.name]) if key.name in defaults else key.make_default()
            if value is REQUIRED:
                raise ConfigError(f"{path}: required, but not given; expected {expected(key.type)}: {key.help}")
            arguments[key.name] = value
        elif is_list(kind) and is_section(element(kind)) and isinstance(tree[key.name], list):
            arguments[key.name] = [
                _build(element(kind), item, {}, f"{path}.{i}.", where) for i, item in enumerate(tree[key.name])
            ]
        else:
            arguments[key.name] = convert(key.type, tree[key.name], key.bounds, path, where)
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{prefix}{error}" if prefix else str(error)) from error
