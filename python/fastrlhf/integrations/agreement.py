"""Whether a replacement agrees with the host's function: results, dtypes, gradients and errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .seam import Call, Function, declines

# relative and absolute, of results that both functions compute in the dtype or better and round once
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


GRADIENTS = "result[1]"  # where `_run` puts them


class Disagreement(Exception):
    """A replacement does not do what the host's function does."""


class HostFailed(Disagreement):
    """The host's own function does not run."""


class _TooFar(Disagreement):
    """Values of one result differ by more than the tolerance."""


class Agreement(NamedTuple):
    """What was compared and found good.

    Args:
        error: the largest |ours - host's| in units of `_unit`; or of ours to the host's function in float64, where
            `hosts_error` is given.
        declined: why ours left the call to the host.
        hosts_error: of the host's own result to its function in float64, where it differs from ours by more than the
            tolerance and ours is the nearer one.
    """

    error: float
    declined: str = ""
    hosts_error: float | None = None


def compare(original: Function, replacement: Function, call: Call) -> Agreement:
    """Calls both; raises `Disagreement` where they differ, unless ours is nearer to the host's function in float64."""
    with declines() as reasons:
        found = _compare_call(original, replacement, call)
    return found._replace(declined=reasons[0]) if reasons else found


def _compare_call(original: Function, replacement: Function, call: Call) -> Agreement:
    with _own_random_state(call):
        theirs = _run(original, call) if call.differs is None else None
        ours = _run(replacement, call)
    if call.differs is not None or (call.lacks is not None and isinstance(theirs, call.lacks)):
        if isinstance(ours, Exception):
            raise Disagreement(f"{call.name}: ours raised {type(ours).__name__}: {ours}")
        if not all(bool(torch.isfinite(t).all()) for t in tensors(ours) if t.is_floating_point()):
            raise Disagreement(f"{call.name}: ours is not finite")
        return Agreement(0.0)
    if call.raises is not None or isinstance(theirs, Exception) or isinstance(ours, Exception):
        return _compare_errors(theirs, ours, call)
    pairs = list(_pairs(ours, theirs, call))
    try:
        return Agreement(max((_compare(a, b, path, call) for path, a, b in pairs), default=0.0))
    except _TooFar as far:
        nearer = _nearer_to_float64(original, pairs, call)
        if nearer is None:
            raise far
        return nearer


def _nearer_to_float64(original: Function, pairs: list[tuple[str, Any, Any]], call: Call) -> Agreement | None:
    """Where ours and the host's differ: who is right. None if it cannot be told, or if it is not ours everywhere."""
    with _own_random_state(call), _InFloat64():
        result = _run(call.definition or original, replace(call, args=_double(call.args), kwargs=_double(call.kwargs)))
    exact = list(_leaves(result, "result"))
    if [path for path, _ in exact] != [path for path, _, _ in pairs]:
        return None
    ours_worst, hosts_worst = 0.0, 0.0
    for (path, ours, theirs), (_, e) in zip(pairs, exact, strict=True):
        try:
            _compare(ours, theirs, path, call)
        except _TooFar:
            if not isinstance(e, Tensor) or e.dtype != torch.float64 or e.shape != ours.shape or not bool(e.isfinite().all()):
                return None
            mine, host = _relative(ours, e, path, call), _relative(theirs, e, path, call)
            if not mine <= max(host, call.tolerance or TOLERANCES[ours.dtype]):
                return None
            ours_worst, hosts_worst = max(ours_worst, mine), max(hosts_worst, host)
    return Agreement(ours_worst, hosts_error=hosts_worst)


def _own_random_state(call: Call) -> AbstractContextManager[None]:
    return torch.random.fork_rng({t.device for t in tensors([call.args, call.kwargs]) if t.is_cuda})


class _InFloat64(TorchFunctionMode):
    """Where a function converts to float32 itself, or makes tensors of the default dtype."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        wider = {torch.float32: torch.float64}
        args = tuple(wider.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        kwargs = {k: wider.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        out = func(*args, **kwargs)
        made = isinstance(out, Tensor) and out.dtype == torch.float32 and "dtype" not in kwargs
        if made and not any(isinstance(a, Tensor) for a in (*args, *kwargs.values())):
            return func(*args, **kwargs, dtype=torch.float64)
        return out


def _relative(a: Tensor, exact: Tensor, path: str, call: Call) -> float:
    dtype, a, exact = a.dtype, a.detach().double().cpu(), exact.detach().cpu()
    return float(((a - exact).abs() / _unit(exact, dtype, path, call)).nan_to_num(nan=float("inf")).max())


def _unit(exact: Tensor, dtype: torch.dtype, path: str, call: Call) -> Tensor:
    """What an error is measured in: of a gradient its largest element, as its sums round by their largest terms and a mean
    over many tokens makes all of them small; of a result itself, and its largest element between 0.01 and 1, as what is near
    0 may be a difference (a log-prob)."""
    size = exact.abs().nan_to_num()
    largest = size.max() if size.numel() else size.new_ones(())
    if call.grads and path.startswith(GRADIENTS):
        return largest.clamp(min=torch.finfo(dtype).smallest_normal).expand_as(size)
    return size + largest.clamp(0.01, 1.0)


def _double(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.double() if x.is_floating_point() else x
    if isinstance(x, dict):
        return {k: _double(v) for k, v in x.items()}
    if isinstance(x, list | tuple) and not hasattr(x, "_fields"):
        return type(x)(_double(v) for v in x)
    return x


def _run(function: Function, call: Call) -> Any:
    args, kwargs = _clone(call.args), _clone(call.kwargs)
    wanted = [args[i].requires_grad_() for i in call.grads]
    inputs = [_through(args[i]) if i in call.grads else args[i] for i in range(len(args))]
    try:
        result = function(*inputs, **kwargs)
    except Exception as error:
        return error
    if not wanted:
        return result
    outputs = [t for t in tensors(result) if t.requires_grad]
    total = sum(((o.double() * _weights(o)).sum() for o in outputs), torch.zeros((), dtype=torch.float64))
    grads = torch.autograd.grad(total, wanted, allow_unused=True) if total.requires_grad else [None] * len(wanted)
    return result, [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, grads, strict=True)]


def _through(t: Tensor) -> Tensor:
    """Not a leaf: some functions write over their input."""
    return t * 1.0


def _weights(t: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, max(t.numel(), 1), dtype=torch.float64, device=t.device)[: t.numel()].view(t.shape)


def _clone(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.detach().clone()
    if isinstance(x, dict):
        return {k: _clone(v) for k, v in x.items()}
    if isinstance(x, list | tuple) and not hasattr(x, "_fields"):
        return type(x)(_clone(v) for v in x)
    return x


def tensors(x: Any) -> Iterator[Tensor]:
    """Those in a result, however deep."""
    for _, leaf in _leaves(x, ""):
        if isinstance(leaf, Tensor):
            yield leaf


def _pairs(ours: Any, theirs: Any, call: Call) -> Iterator[tuple[str, Any, Any]]:
    a, b = list(_leaves(ours, "result")), list(_leaves(theirs, "result"))
    if [p for p, _ in a] != [p for p, _ in b]:
        raise Disagreement(f"{call.name}: the results' structure differs: {[p for p, _ in a]} and {[p for p, _ in b]}")
    for (path, x), (_, y) in zip(a, b, strict=True):
        yield path, x, y


def _leaves(x: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(x, dict):
        for k in sorted(x):
            yield from _leaves(x[k], f"{path}[{k!r}]")
    elif isinstance(x, list | tuple):
        for i, v in enumerate(x):
            yield from _leaves(v, f"{path}[{i}]")
    else:
        yield path, x


def _compare(ours: Any, theirs: Any, path: str, call: Call) -> float:
    if not isinstance(theirs, Tensor):
        if isinstance(theirs, float) and isinstance(ours, float):
            ours, theirs = torch.tensor(ours), torch.tensor(theirs)
        elif ours is theirs or ours == theirs:
            return 0.0
        else:
            raise Disagreement(f"{call.name}: {path} is {ours!r}, the host's {theirs!r}")
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        raise Disagreement(
            f"{call.name}: {path} is {ours.dtype} {tuple(ours.shape)}, the host's {theirs.dtype} {tuple(theirs.shape)}"
        )
    if not theirs.is_floating_point():
        if not torch.equal(ours, theirs):
            raise Disagreement(f"{call.name}: {path} differs in {int((ours != theirs).sum())} of {ours.numel()} elements")
        return 0.0
    tolerance = call.tolerance or TOLERANCES[theirs.dtype]
    a, b = ours.detach().double().cpu(), theirs.detach().double().cpu()
    same = (a == b) | (a.isnan() & b.isnan())
    error = torch.where(same, torch.zeros_like(a), (a - b).abs() / _unit(b, theirs.dtype, path, call))
    worst = float(error.max()) if error.numel() else 0.0
    if not worst <= tolerance:
        at = int(error.nan_to_num(nan=float("inf")).argmax())
        raise _TooFar(
            f"{call.name}: {path} is {float(a.flatten()[at]):.8g}, the host's {float(b.flatten()[at]):.8g} "
            f"(error {worst:.2g}, tolerance {tolerance:.2g})"
        )
    return worst


def _compare_errors(theirs: Any, ours: Any, call: Call) -> Agreement:
    expected = call.raises or type(theirs)
    if call.raises is None and isinstance(theirs, Exception) and not isinstance(ours, Exception):
        raise HostFailed(f"{call.name}: the host's function raised {type(theirs).__name__}: {theirs}")
    for name, got in (("the host", theirs), ("ours", ours)):
        if not isinstance(got, expected):
            what = f"raised {type(got).__name__}: {got}" if isinstance(got, Exception) else "raised nothing"
            names = " or ".join(e.__name__ for e in (expected if isinstance(expected, tuple) else (expected,)))
            raise Disagreement(f"{call.name}: {name} {what}; expected {names}")
    return Agreement(0.0)
