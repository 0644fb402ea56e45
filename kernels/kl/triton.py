"""The token-level KL estimators and their gradient: kernels/common/kl_math.h."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.launch import launch
from ..common.tiles import tile
from ..common.triton_kl import kl_clamped
from ..common.triton_tokens import known_multiple


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["s_logprobs", "s_ref"])
def kl_kernel(
    logprobs, ref_logprobs, grad, out, n, s_logprobs, s_ref, clamp_input, clamp_output,
    KIND: tl.constexpr, STRAIGHT_THROUGH: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = known_multiple(n, ALIGNED)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    x = tl.load(logprobs + i * s_logprobs, mask=inside, other=0).to(tl.float32)
    d = x - tl.load(ref_logprobs + i * s_ref, mask=inside, other=0).to(tl.float32)
    value, slope = kl_clamped(d, clamp_input, clamp_output, KIND, STRAIGHT_THROUGH)
    if grad is None:
        tl.store(out + i, value, mask=inside)
    else:
        tl.store(out + i, tl.load(grad + i, mask=inside, other=0) * slope, mask=inside)


def kl(
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    grad: torch.Tensor | None,
    *,
    kind: int,
    clamp_input: float,
    clamp_output: float,
    straight_through: bool,
    out: torch.Tensor,
) -> None:
    """The estimator of each element, or grad times its slope: the gradient of logprobs."""
    n = logprobs.numel()
    choice = tile("kl", logprobs, n)
    launch(
        kl_kernel, (triton.cdiv(n, choice["BLOCK"]),), logprobs, ref_logprobs, grad, out, n, logprobs.stride(0),
        ref_logprobs.stride(0), float(clamp_input), float(clamp_output), KIND=kind, STRAIGHT_THROUGH=straight_through,
        ALIGNED=n % 16 == 0, **choice,
    )  # fmt: skip
