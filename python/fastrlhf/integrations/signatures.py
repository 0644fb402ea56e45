"""Whether a replacement takes what the host's function takes."""

from __future__ import annotations

from inspect import Parameter, Signature, signature
from typing import Any

import torch

POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
VARIADIC = {Parameter.VAR_POSITIONAL: "*", Parameter.VAR_KEYWORD: "**"}


def signature_of(held: Any, *, own: bool = False) -> Signature:
    """Of what a seam's attribute holds; of an autograd function its forward's, which is called by position.

    Args:
        own: not that of a function which it wraps: a replacement carries the original's.

    Raises:
        TypeError, ValueError: it shows none.
    """
    made = held if isinstance(held, type) else getattr(held, "__self__", None)
    if isinstance(made, type) and issubclass(made, torch.autograd.Function):
        parameters = list(signature(made.forward).parameters.values())[1:]
        return Signature([p.replace(kind=Parameter.POSITIONAL_ONLY) for p in parameters if p.kind in POSITIONAL])
    return signature(getattr(held, "apply") if isinstance(held, type) else held, follow_wrapped=not own)  # noqa: B009


def mismatch(host: Signature, ours: Signature) -> str | None:
    """The first parameter of the host's that ours does not take as the host does, by name, position and default; or None."""
    places = [p for p in ours.parameters.values() if p.kind in POSITIONAL]
    for i, theirs in enumerate(host.parameters.values()):
        if theirs.kind in VARIADIC:
            if all(p.kind != theirs.kind for p in ours.parameters.values()):
                return f"{VARIADIC[theirs.kind]}{theirs.name}, which ours does not take"
            continue
        if theirs.kind == Parameter.POSITIONAL_ONLY:
            found = places[i] if i < len(places) else None
        else:
            found = ours.parameters.get(theirs.name)
        if found is None or found.kind in VARIADIC:
            return f"{theirs.name!r}, which ours does not take"
        if theirs.kind in POSITIONAL and (i >= len(places) or places[i] is not found):
            return f"{theirs.name!r}, which ours takes at another position"
        if theirs.default is not Parameter.empty and theirs.default != found.default:
            return f"{theirs.name!r} with the default {theirs.default!r}, ours {_default(found)}"
    return _needed(host, ours)


def _needed(host: Signature, ours: Signature) -> str | None:
    taken = len([p for p in host.parameters.values() if p.kind == Parameter.POSITIONAL_ONLY])
    for name, p in list(ours.parameters.items())[taken:]:
        if p.default is Parameter.empty and p.kind not in VARIADIC and name not in host.parameters:
            return f"no {name!r}, which ours needs"
    return None


def _default(p: Parameter) -> str:
    return "without one" if p.default is Parameter.empty else f"with {p.default!r}"
