"""One case: ours against the definition in float64, judged by the error of the definition in plain float32 PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cases import Case, Tensors

SLACK = 1e-6
GRADIENT = "gradient of "
NOTHING = 1e-12  # what is left in float64 of a gradient that is 0


@dataclass
class Result:
    """Of one comparison; `error` and `bar` are relative to the largest element of a gradient, and of a result where that
    is over 1: a mean over many tokens makes each gradient small, and a log-prob near 0 is as exact as its logits.

    `passed` is None where nothing was compared, and `note` says why; `hosts_error` is the host's own distance from its function
    in float64, where it is ours that is the nearer one.
    """

    kind: str  # "op" or "seam"
    name: str
    input: str
    passed: bool | None
    error: float | None = None
    bar: float | None = None
    note: str = ""
    hosts_error: float | None = None


def check(case: Case, backend: str | None) -> Result:
    """Runs it three times. What is raised is a failure, not a crash of the command."""

    def failed(note: str, error: float | None = None, bar: float | None = None) -> Result:
        return Result("op", case.op, case.input, False, error, bar, note)

    try:
        tensors = case.inputs()
        ours = _run(case, tensors, None, backend)
        exact = _run(case, tensors, torch.float64, "reference")
        plain = _run(case, tensors, torch.float32, "reference")
    except Exception as error:
        return failed(f"raised {type(error).__name__}: {error}")
    if ours.keys() != exact.keys():
        missing, extra = ([n for n in a if n not in b] for a, b in ((exact, ours), (ours, exact)))
        return failed("; ".join([f"no {n}" for n in missing] + [f"a {n} too many" for n in extra]))
    worst, bar = 0.0, 0.0
    for path, a in ours.items():
        found = _judge(a, exact[path], plain[path], is_gradient=path.startswith(GRADIENT))
        if isinstance(found, str):
            return failed(f"{path}: {found}")
        if found[0] > found[1]:
            return failed(f"{path}: error {found[0]:.2g}, allowed {found[1]:.2g}", *found)
        if found[0] >= worst:
            worst, bar = found
    return Result("op", case.op, case.input, True, worst, bar)


def _run(case: Case, tensors: Tensors, dtype: torch.dtype | None, backend: str | None) -> dict[str, Tensor]:
    """Outputs and gradients by name. The definition runs on the CPU, where float64 is."""
    inputs = {}
    for name, t in tensors.items():
        if dtype is not None:
            t = t.cpu().to(dtype) if t.is_floating_point() else t.cpu()
        inputs[name] = t.detach().requires_grad_(name in case.grads)
    results = dict(_tensors(case.function(inputs, backend)))
    if case.grads:
        total = sum((o.double() * _weights(o)).nan_to_num(0, 0, 0).sum() for o in results.values() if o.requires_grad)
        if isinstance(total, Tensor) and total.requires_grad:
            wanted = [inputs[n] for n in case.grads]
            for name, g in zip(case.grads, torch.autograd.grad(total, wanted, allow_unused=True), strict=True):
                if g is not None:
                    results[GRADIENT + name] = g
    for t in tensors.values():
        t.requires_grad_(False)
    return {name: t.detach() for name, t in results.items()}


def _tensors(x: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(x, Tensor):
        yield "result", x
    else:
        for i, t in enumerate(x):
            yield f"result {i}", t


def _weights(t: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, max(t.numel(), 1), dtype=torch.float64, device=t.device)[: t.numel()].view(t.shape)


def _judge(ours: Tensor, exact: Tensor, plain: Tensor, *, is_gradient: bool) -> tuple[float, float] | str:
    """(error, bar), or what is wrong with the result itself."""
    if ours.shape != exact.shape:
        return f"shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    if ours.dtype != plain.dtype and not is_gradient:  # which has its input's
        return f"{ours.dtype}, expected {plain.dtype}"
    rounding = torch.finfo(ours.dtype) if ours.dtype in (torch.bfloat16, torch.float16) else None
    a, e, p = (t.cpu().double() for t in (ours, exact, plain))
    strange = ~e.isfinite()
    if bool(strange.any()) and not torch.equal(a[strange].nan_to_num(7, 8, 9), e[strange].nan_to_num(7, 8, 9)):
        return f"{int(strange.sum())} values should not be finite and are"
    a, e, p = a[~strange], e[~strange], p[~strange]
    if not bool(a.isfinite().all()):
        return f"{int((~a.isfinite()).sum())} values are not finite"
    if not e.numel():
        return 0.0, SLACK
    off = (a - e).abs()
    if rounding is not None:
        once = rounding.eps * (0.51 * e.abs()).clamp(min=rounding.smallest_normal)  # subnormals, when scaled, twice
        off = (off - once).clamp(min=0)
    largest = float(e.abs().max())
    scale = largest if is_gradient and largest > NOTHING else max(1.0, largest)
    return float(off.max()) / scale, 2 * float((p - e).abs().nan_to_num(0).max()) / scale + SLACK
