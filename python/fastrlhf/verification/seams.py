"""An installed framework's functions against ours, on the user's shapes and device, with time and memory of both."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..integrations import agreement, patching
from ..integrations.seam import Call, Entry, Host, Seam, Sizes
from .checking import Result
from .speed import peak_bytes, seconds

NO_INPUT = "none"


@dataclass
class Speed:
    """Of one seam, forward and backward where it has one; seconds and bytes."""

    seam: str
    input: str
    theirs_seconds: float
    ours_seconds: float
    theirs_bytes: int
    ours_bytes: int


def check_seams(host: Host, sizes: Sizes, *, measure: bool) -> Iterator[Result | Speed]:
    """A result for each call of each seam, on the small inputs and on `sizes`; then the speed of the first."""
    try:
        importlib.import_module(host.package)
    except Exception as error:
        yield Result("seam", host.package, "import", False, note=f"raised {type(error).__name__}: {error}")
        return
    patching.remove(host)  # a plug-in may have patched it when it was imported
    for seam in host.seams:
        try:
            yield from _check_seam(seam, sizes, measure)
        except Exception as error:
            yield Result("seam", seam.name, "its inputs", False, note=f"raised {type(error).__name__}: {error}")


def _check_seam(seam: Seam | Entry, sizes: Sizes, measure: bool) -> Iterator[Result | Speed]:
    try:
        patching.require_op(seam.op)
        _, original = patching.find(seam, importlib.import_module(seam.module))
        if reason := patching.uncompared(seam, original):
            raise patching.Unavailable(reason)
        replacement = patching.build(seam, original)
    except Exception as error:
        why = str(error) if isinstance(error, patching.Unavailable) else f"{type(error).__name__}: {error}"
        yield Result("seam", seam.name, NO_INPUT, None, note=why)
        return
    theirs, ours = seam.pair(original, replacement)
    first: Call | None = None
    for where in (Sizes(), sizes):
        for call in seam.calls_of(original, where):
            yield _check(seam, call, theirs, ours, where)
            if where is sizes and first is None and call.differs is None and call.raises is None:
                first = call
    if measure and first is not None:
        yield _speed(seam, first, theirs, ours, sizes.device)


def _check(seam: Seam | Entry, call: Call, theirs: Any, ours: Any, sizes: Sizes) -> Result:
    name = (
        call.name
        if sizes == Sizes()
        else f"{call.name}, {sizes.rows}x{sizes.length}x{sizes.vocab} {sizes.dtype} {sizes.device}"
    )
    bar = call.tolerance or agreement.TOLERANCES[sizes.dtype]
    try:
        found = agreement.compare(theirs, ours, call)
    except agreement.Disagreement as error:
        return Result("seam", seam.name, name, False, None, bar, str(error))
    if found.declined:
        return Result("seam", seam.name, name, None, None, bar, f"left to the host: {found.declined}")
    if call.differs is not None:
        return Result("seam", seam.name, name, None, None, bar, f"the host is wrong there: {call.differs}")
    if found.hosts_error is not None:
        bar = max(bar, found.hosts_error)
    return Result("seam", seam.name, name, True, found.error, bar, hosts_error=found.hosts_error)


def _speed(seam: Seam | Entry, call: Call, theirs: Any, ours: Any, device: str) -> Speed:
    runs = {"theirs": _run(theirs, call), "ours": _run(ours, call)}
    took = seconds(runs, device)
    return Speed(
        seam.name, call.name, took["theirs"], took["ours"], peak_bytes(runs["theirs"], device), peak_bytes(runs["ours"], device)
    )


def _run(function: Any, call: Call) -> Callable[[], None]:
    args = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in call.args]
    wanted = [args[i].requires_grad_() for i in call.grads]

    def run() -> None:
        result = function(*args, **call.kwargs)
        outputs = [t for t in agreement.tensors(result) if t.requires_grad]
        if wanted and outputs:
            torch.autograd.grad([o.sum() for o in outputs], wanted, allow_unused=True)

    return run
