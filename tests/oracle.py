"""How correctness is judged: against the definition in float64 on the same inputs, by the error of plain float32 PyTorch."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SLACK = 1e-6
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # where a program takes milliseconds: fewer rows, the same kinds
EXAMPLES = 10 if INTERPRETED else 60  # of each of hypothesis' tests


def assert_accurate(ours: Tensor, oracle: Tensor, plain: Tensor, what: str = "") -> None:
    """|ours - oracle| <= 2 |plain - oracle| + 1e-6, of the largest errors; relative to the oracle's scale above 1.

    `plain` is the same computation in float32 PyTorch. Non-finite values must agree exactly.
    """
    assert ours.shape == oracle.shape, (what, ours.shape, oracle.shape)
    # what float32 cannot hold is an infinity in it too
    overflows = ours.dtype == torch.float32 and oracle.numel() and float(oracle.detach().abs().nan_to_num().max()) > 1e38
    oracle = oracle.detach().float().double() if overflows else oracle.detach().double()
    ours, plain = ours.detach().double(), plain.detach().double()
    finite = oracle.isfinite()
    strange = ~finite
    assert torch.equal(ours[strange].nan_to_num(7, 8, 9), oracle[strange].nan_to_num(7, 8, 9)), (
        what,
        "non-finite values differ",
    )
    assert ours[finite].isfinite().all(), (what, "not finite where the oracle is")
    huge = finite & (oracle.abs() > 1e6)
    torch.testing.assert_close(ours[huge], oracle[huge], rtol=4e-6, atol=0)  # a float32 difference of 30 is good to 2e-6
    rest = finite & ~huge
    if not rest.any():
        return
    scale = max(1.0, float(oracle[rest].abs().max()))
    allowed = 2 * float((plain - oracle)[rest].abs().nan_to_num().max()) + SLACK * scale
    error = float((ours - oracle)[rest].abs().max())
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def assert_gradient_accurate(ours: Tensor, oracle: Tensor, plain: Tensor, what: str = "") -> None:
    """As above, for a gradient written in the input's dtype: half a unit in its last place is not an error."""
    unit = torch.finfo(ours.dtype).eps
    if ours.dtype in (torch.bfloat16, torch.float16):
        difference = (ours.double() - oracle.double()).abs()
        tiny = torch.finfo(ours.dtype).tiny
        allowed = oracle.double().abs() * unit * 0.51 + 1e-6 + tiny
        assert bool((difference <= allowed).all()), f"{what}: {float((difference - allowed).max()):.3g} over the rounding"
    else:
        assert_accurate(ours, oracle, plain, what)


def gradcheck(backend: str, function: Callable[..., Tensor], inputs: Any) -> bool:
    """torch's, which needs float64; kernels on a GPU have none, and their gradients are compared with the oracle's."""
    return backend in ("cuda", "triton") or torch.autograd.gradcheck(function, inputs)
