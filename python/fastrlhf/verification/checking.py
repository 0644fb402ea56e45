"""One case: ours against the definition in float64, judged by the error of the definition in plain float32 PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cases import Case, Tensors

SLACK = 1e-6


@dataclass
class Result:
    """Of one comparison; `error` and `bar` are relative to 1 + the largest value.

    `hosts_error` is the host's own distance from its function in float64, where it is ours that is the nearer one.
    """

    kind: str  # "op" or "seam"
    name: str
    input: str
    passed: bool
    error: float | None = None
    bar: float | None = None
    note: str = ""
    hosts_error: float | None = None


def check(case: Case, backend: str | None) -> Result:
    """Runs it three times. What ours raises is a failure, not a crash of the command."""
    tensors = case.inputs()
    try:
        ours = _run(case, tensors, None, backend)
    except Exception as error:
        return Result("op", case.op, case.input, False, note=f"raised {type(error).__name__}: {error}")
    exact = _run(case, tensors, torch.float64, "reference")
    plain = _run(case, tensors, torch.float32, "reference")
    worst, bar = 0.0, 0.0
    for (path, a), (_, e), (_, p) in zip(ours, exact, plain, strict=True):
        found = _judge(a, e, p)
        if isinstance(found, str):
            return Result("op", case.op, case.input, False, note=f"{path}: {found}")
        if found[0] > found[1]:
            note = f"{path}: error {found[0]:.2g}, allowed {found[1]:.2g}"
            return Result("op", case.op, case.input, False, *found, note=note)
        if found[0] >= worst:
            worst, bar = found
    return Result("op", case.op, case.input, True, worst, bar)


def _run(case: Case, tensors: Tensors, dtype: torch.dtype | None, backend: str | None) -> list[tuple[str, Tensor]]:
    """Outputs and gradients by name. The definition runs on the CPU, where float64 is."""
    inputs = {}
    for name, t in tensors.items():
        if dtype is not None:
            t = t.cpu().to(dtype) if t.is_floating_point() else t.cpu()
        inputs[name] = t.detach().requires_grad_(name in case.grads)
    results = list(_tensors(case.function(inputs, backend)))
    if case.grads:
        total = sum((o.double() * _weights(o)).nan_to_num(0, 0, 0).sum() for _, o in results if o.requires_grad)
        if isinstance(total, Tensor) and total.requires_grad:
            wanted = [inputs[n] for n in case.grads]
            for name, g in zip(case.grads, torch.autograd.grad(total, wanted, allow_unused=True), strict=True):
                if g is not None:
                    results.append((f"the gradient of {name}", g))
    for t in tensors.values():
        t.requires_grad_(False)
    return [(name, t.detach()) for name, t in results]


def _tensors(x: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(x, Tensor):
        yield "result", x
    else:
        for i, t in enumerate(x):
            yield f"result {i}", t


def _weights(t: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, max(t.numel(), 1), dtype=torch.float64, device=t.device)[: t.numel()].view(t.shape)


def _judge(ours: Tensor, exact: Tensor, plain: Tensor) -> tuple[float, float] | str:
    """(error, bar), or what is wrong with the result itself."""
    if ours.shape != exact.shape:
        return f"shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    unit = torch.finfo(ours.dtype).eps if ours.dtype in (torch.bfloat16, torch.float16) else 0.0
    a, e, p = (t.cpu().double() for t in (ours, exact, plain))
    strange = ~e.isfinite()
    if bool(strange.any()) and not torch.equal(a[strange].nan_to_num(7, 8, 9), e[strange].nan_to_num(7, 8, 9)):
        return f"{int(strange.sum())} values should not be finite and are"
    a, e, p = a[~strange], e[~strange], p[~strange]
    if not bool(a.isfinite().all()):
        return f"{int((~a.isfinite()).sum())} values are not finite"
    if not e.numel():
        return 0.0, SLACK
    scale = max(1.0, float(e.abs().max()))
    error = float(((a - e).abs() - 0.51 * unit * e.abs()).clamp(min=0).max()) / scale
    return error, 2 * float((p - e).abs().nan_to_num(0).max()) / scale + SLACK
