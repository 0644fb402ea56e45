"""What an engine promises, as data: signatures, states, which versions were read; and a check of it against an engine's files.

Files are read by `ast`, never imported: an unpacked wheel will do.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from ..errors import UserError

HERE = Path(__file__).parent / "contracts"
ENGINES = ("vllm", "sglang", "checkpoint-engine", "tensorrt-llm", "tensorrt")


class ContractError(UserError, RuntimeError):
    """An engine that is not what was recorded, or whose version nobody has looked at."""


@dataclass(frozen=True)
class Contract:
    """
    Args:
        package: its distribution.
        versions: [first, end) that the recording holds for.
        recorded: where it was read.
        signatures: parameters by file and qualified name: `x`, `x=` with a default, `*`, `*args`, `**kwargs`.
        fields: annotated names of classes, by file and class: those we use.
        states: what may be called in which state and where it leads; "*" is any state. A call that is not there is refused.
        rules: what else holds, in words; the fakes of the tests enforce them.
    """

    engine: str
    package: str
    versions: tuple[str, str]
    recorded: str
    signatures: dict[str, dict[str, list[str]]]
    fields: dict[str, dict[str, list[str]]]
    start: str
    states: dict[str, dict[str, str]]
    rules: list[str]

    def parameters(self, call: str) -> list[str]:
        """Of a method by its own name."""
        for functions in self.signatures.values():
            for name, parameters in functions.items():
                if name.rpartition(".")[2] == call:
                    return parameters
        raise KeyError(call)


def load(engine: str) -> Contract:
    if engine not in ENGINES:
        raise ContractError(f"contract: expected one of {', '.join(ENGINES)}, got {engine!r}")
    data = json.loads((HERE / f"{engine}.json").read_text())
    return Contract(**data | {"versions": tuple(data["versions"])})


def require_version(engine: str, version: str | None = None, *, any_version: bool = False) -> str:
    """The installed version of an engine, if the contract holds for it.

    Raises:
        ContractError: it is not installed, or of a version outside the recorded range and `any_version` is false.
    """
    contract = load(engine)
    if version is None:
        try:
            version = distribution(contract.package).version
        except PackageNotFoundError:
            raise ContractError(f"{contract.package}: not installed here; docs/refit.md has the lines") from None
    low, end = contract.versions
    if not any_version and not _key(low) <= _key(version) < _key(end):
        raise ContractError(
            f"{contract.package}: version {version} was not looked at, only {low} <= version < {end}; "
            "--generation.any_version true uses it all the same"
        )
    return version


def check(engine: str, root: Path) -> list[str]:
    """What differs between the contract and an engine's files below `root`, a site-packages or an unpacked wheel."""
    contract, out = load(engine), []
    for file in sorted({*contract.signatures, *contract.fields}):
        path = root / file
        if not path.is_file():
            out.append(f"{file}: there is no such file")
            continue
        tree = ast.parse(path.read_text())
        found, names = dict(signatures_of(tree)), dict(_fields_of(tree))
        for name, expected in contract.signatures.get(file, {}).items():
            if name not in found:
                out.append(f"{file}: {name}: there is no such function")
            elif found[name] != expected:
                out.append(f"{file}: {name}: expected ({', '.join(expected)}), found ({', '.join(found[name])})")
        for name, fields in contract.fields.get(file, {}).items():
            missing = sorted(set(fields) - set(names.get(name, ())))
            if missing:
                out.append(f"{file}: {name}: without {', '.join(missing)}")
    return out


def signatures_of(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from signatures_of(node, prefix + node.name + ".")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name, _parameters(node.args)
        elif isinstance(node, ast.If | ast.Try):
            yield from signatures_of(node, prefix)


def _parameters(args: ast.arguments) -> list[str]:
    plain = [*args.posonlyargs, *args.args]
    first = len(plain) - len(args.defaults)
    out = [a.arg + ("=" if i >= first else "") for i, a in enumerate(plain)]
    if args.vararg:
        out.append("*" + args.vararg.arg)
    elif args.kwonlyargs:
        out.append("*")
    out += [a.arg + ("=" if d is not None else "") for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    if args.kwarg:
        out.append("**" + args.kwarg.arg)
    return out


def _fields_of(tree: ast.AST) -> Iterator[tuple[str, list[str]]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield node.name, [n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]


def _key(version: str) -> tuple[int, ...]:
    """Of the release: 1.2.0rc3 counts as 1.2.0."""
    out = []
    for part in version.split("+")[0].split(".")[:3]:
        digits = ""
        for letter in part:
            if not letter.isdigit():
                break
            digits += letter
        out.append(int(digits or 0))
    return tuple(out + [0] * (3 - len(out)))


def record(root: Path, wanted: dict[str, list[str]]) -> dict[str, dict[str, list[str]]]:
    """The signatures of functions by file, for a new recording.

    Raises:
        ContractError: one that is not there.
    """
    out: dict[str, dict[str, list[str]]] = {}
    for file, names in wanted.items():
        found = dict(signatures_of(ast.parse((root / file).read_text())))
        if missing := [n for n in names if n not in found]:
            raise ContractError(f"{file}: {missing[0]}: there is no such function")
        out[file] = {n: found[n] for n in names}
    return out


def as_json(contract: dict[str, Any]) -> str:
    return json.dumps(contract, indent=1) + "\n"
