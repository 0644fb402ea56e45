"""verl's seams, read in 0.7 to 0.9 and run against 0.9.1."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...ops import backend as backends
from ...ops.masked_stats import moments
from ..seam import Call, Entry, Host, Seam, Sizes, decline, in_place_of, obstacle
from . import semantics
from .inputs import inputs
from .verl_groups import GROUP_SEAMS
from .verl_linear import LINEAR_SEAMS
from .verl_losses import LOSS_ENTRIES, value_loss, value_loss_calls

FUNCTIONAL, ALGORITHMS = "verl.utils.torch_functional", "verl.trainer.ppo.core_algos"


# --- from logits -------------------------------------------------------------------------------------------------------------


def logprobs_v2(original: Any) -> Any:
    @in_place_of(original)
    def replacement(logits: Tensor, labels: Tensor) -> Tensor:
        reason = obstacle(logits)
        if reason is not None:
            decline("verl logprobs_from_logits_v2", reason)
            return original(logits, labels)
        return semantics.logprobs(logits, labels)

    return replacement


def logprobs_flash(original: Any) -> Any:
    @in_place_of(original)
    def replacement(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
        reason = obstacle(logits)
        if reason is not None:
            decline("verl logprobs_from_logits_flash_attn", reason)
            return original(logits, labels, inplace_backward=inplace_backward)
        return semantics.logprobs(
            logits, labels, dtype=torch.float32, ignore_index=-100, inplace_backward=inplace_backward and logits.requires_grad
        )

    return replacement


def entropy(original: Any) -> Any:
    @in_place_of(original)
    def replacement(logits: Tensor) -> Tensor:
        reason = obstacle(logits)
        if reason is not None:
            decline("verl entropy_from_logits", reason)
            return original(logits)
        return semantics.entropy(logits)

    return replacement


def entropy_with_chunking(original: Any) -> Any:
    @in_place_of(original)
    def replacement(logits: Tensor, chunk_size: int = 2048) -> Tensor:
        reason = obstacle(logits)
        if reason is not None:
            decline("verl entropy_from_logits_with_chunking", reason)
            return original(logits, chunk_size)
        return semantics.entropy(logits, dtype=torch.float32)

    return replacement


def logits_calls(labels: bool, roundoff: float, double: float | None = None) -> Callable[[Sizes], Iterator[Call]]:
    """`roundoff`: of the host in half precision, where it sums in the logits' dtype; `double`: in float64."""

    def calls(sizes: Sizes) -> Iterator[Call]:
        make = inputs(sizes)
        dtypes = (sizes.dtype,) if sizes != Sizes() else (torch.float32, torch.bfloat16, torch.float64)
        for dtype in dtypes:
            rows = sizes.rows * (2 if sizes == Sizes() else sizes.length)  # packed, as verl's engines call it
            x = make.logits(rows).to(dtype)
            y = (make.labels(rows),) if labels else ()
            loose = roundoff if dtype in (torch.bfloat16, torch.float16) else double if dtype == torch.float64 else None
            yield Call(f"{dtype}", (x, *y), grads=(0,), tolerance=loose)
            shifted = (x.float() + 1e4).to(dtype)
            if dtype == torch.float32:
                yield Call("offset of 1e4", (shifted, *y), tolerance=2e-3)
        masked = make.logits(sizes.rows)
        masked[:, ::3] = -torch.inf
        y = (torch.ones(sizes.rows, dtype=torch.int64, device=sizes.device),) if labels else ()
        why = None if labels else "0 · -inf is NaN in the host's entropy"
        if sizes.dtype == torch.float32:
            yield Call("-inf logits", (masked, *y), differs=why)

    return calls


def batch_logits_calls(sizes: Sizes) -> Iterator[Call]:
    yield from logits_calls(True, 2e-2)(sizes)
    make = inputs(sizes, 1)
    x, y = make.logits(sizes.rows, sizes.length), make.labels(sizes.rows, sizes.length)
    yield Call("(B, T, V)", (x, y), grads=(0,), tolerance=None if sizes.dtype == torch.float32 else 2e-2)
    if sizes == Sizes():
        yield Call("a label of -100", (x, torch.full_like(y, -100)), raises=(RuntimeError, IndexError))


# --- masked statistics -------------------------------------------------------------------------------------------------------


def masked_sum(original: Any) -> Any:
    @in_place_of(original)
    def replacement(values: Any, mask: Any, axis: Any = None) -> Tensor:
        reason = semantics.statistics_obstacle(values, mask) or (f"axis {axis}" if isinstance(axis, tuple | list) else None)
        if reason is not None:
            decline("verl masked_sum", reason)
            return original(values, mask, axis)
        return semantics.sums(values, mask, axis)

    return replacement


def masked_mean(original: Any) -> Any:
    @in_place_of(original)
    def replacement(values: Any, mask: Any, axis: Any = None) -> Tensor:
        reason = semantics.statistics_obstacle(values, mask) or (f"axis {axis}" if isinstance(axis, tuple | list) else None)
        if reason is not None:
            decline("verl masked_mean", reason)
            return original(values, mask, axis)
        return ops.masked_mean(values, mask, axis)

    return replacement


EMPTY, ONE = "At least one element in the mask has to be 1.", "The sum of the mask is one, which can cause a division by zero."


def counted_moments(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """(n, mean, M2); raises where verl does."""
    of = moments(values, mask, backends.choose("masked_var", values, None))
    n = float(of[0])
    if unbiased and n in (0, 1):
        raise ValueError(ONE if n else EMPTY)
    return of


def masked_var(original: Any) -> Any:
    @in_place_of(original)
    def replacement(values: Any, mask: Any, unbiased: bool = True) -> Tensor:
        reason = semantics.statistics_obstacle(values, mask)
        if reason is not None or (values.requires_grad and torch.is_grad_enabled()):
            decline("verl masked_var", reason or "a gradient")
            return original(values, mask, unbiased)
        n, _, m2 = counted_moments(values, mask, unbiased)
        over = n - 1 if unbiased else n.clamp(min=1)
        return (m2 / over).to(values.dtype)

    return replacement


def masked_whiten(original: Any) -> Any:
    @in_place_of(original)
    def replacement(values: Any, mask: Any, shift_mean: bool = True) -> Tensor:
        reason = semantics.statistics_obstacle(values, mask)
        if reason is not None or (values.requires_grad and torch.is_grad_enabled()):
            decline("verl masked_whiten", reason or "a gradient")
            return original(values, mask, shift_mean)
        of = counted_moments(values, mask)
        return semantics.whiten_all(values, mask, shift_mean=shift_mean, unbiased=True, eps=1e-8, of=of)

    return replacement


def statistics_calls(axis: bool, errors: bool, grads: bool) -> Callable[[Sizes], Iterator[Call]]:
    def calls(sizes: Sizes) -> Iterator[Call]:
        make = inputs(sizes)
        x = make.batch()
        for dtype in (torch.float32, torch.bool, torch.int64):
            m = make.mask(dtype)
            yield Call(f"{dtype} mask with gaps", (x, m), grads=(0,) if grads else ())
            if axis:
                yield Call(f"{dtype} mask, axis -1", (x, m, -1), grads=(0,) if grads else ())
        if not errors:
            yield Call("NaN outside the mask", (x.masked_fill(m == 0, torch.nan), m))
        yield Call("bfloat16 values", (x.bfloat16(), make.mask()), tolerance=2e-2)
        empty, one = torch.zeros_like(x), torch.zeros_like(x)
        one[0, 0] = 1
        expected = ValueError if errors else None
        yield Call("an empty mask", (x, empty), raises=expected)
        yield Call("a mask of one", (x, one), raises=expected)

    return calls


def whiten_calls(sizes: Sizes) -> Iterator[Call]:
    yield from statistics_calls(False, True, False)(sizes)
    make = inputs(sizes, 2)
    yield Call("the mean is kept", (make.batch(), make.mask()), {"shift_mean": False})


# --- advantages, KL ----------------------------------------------------------------------------------------------------------


def gae(original: Any) -> Any:
    @in_place_of(original)
    def replacement(
        token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: Any, lam: Any
    ) -> tuple[Tensor, Tensor]:
        reason = semantics.carry_obstacle(token_level_rewards, values, response_mask)
        if reason is not None:
            decline("verl compute_gae_advantage_return", reason)
            return original(token_level_rewards, values, response_mask, gamma, lam)
        advantages, returns = ops.gae(
            token_level_rewards.detach(), values.detach(), response_mask, gamma=float(gamma),
            lam=lam if isinstance(lam, Tensor) and lam.dim() else float(lam), mask_mode="carry",
        )  # fmt: skip
        of = counted_moments(advantages, response_mask)
        semantics.whiten_all(advantages, response_mask, shift_mean=True, unbiased=True, eps=1e-8, of=of, out=advantages)
        return advantages, returns

    return replacement


def gae_calls(sizes: Sizes) -> Iterator[Call]:
    make = inputs(sizes)
    r, v = make.batch(), make.batch()
    for dtype in (torch.float32, torch.int64):
        for gamma, lam in ((0.99, 0.95), (1.0, 1.0), (0.9, 0.0)):
            yield Call(
                f"{dtype} mask with gaps, gamma {gamma}, lam {lam}", (r, v, make.mask(dtype), gamma, lam), tolerance=1e-4
            )
    yield Call("fractions in the mask", (r, v, make.mask() * 0.5, 0.99, 0.95), tolerance=1e-4)
    yield Call("an empty mask", (r, v, torch.zeros_like(r), 1.0, 0.95), raises=ValueError)


KINDS: dict[str, dict[str, Any]] = {
    "kl": {"kind": "k1"}, "k1": {"kind": "k1"}, "abs": {"kind": "abs"}, "mse": {"kind": "k2"}, "k2": {"kind": "k2"},
    "low_var_kl": {"kind": "k3", "clamp_input": 20.0, "clamp_output": 10.0},
    "k3": {"kind": "k3", "clamp_input": 20.0, "clamp_output": 10.0},
}  # fmt: skip


def kl_penalty(original: Any) -> Any:
    @in_place_of(original)
    def replacement(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
        options = KINDS.get(kl_penalty.removesuffix("+"))
        if kl_penalty in ("kl", "k1"):
            return original(logprob, ref_logprob, kl_penalty)  # one subtraction
        reason = "this kind" if options is None else obstacle(logprob, "kl") or obstacle(ref_logprob, "kl")
        if reason is None and (logprob.shape != ref_logprob.shape or logprob.dtype != ref_logprob.dtype):
            reason = "two shapes or dtypes"
        if options is None or reason is not None:
            decline("verl kl_penalty", reason or "")
            return original(logprob, ref_logprob, kl_penalty)
        value = ops.kl(logprob, ref_logprob, **options)
        if kl_penalty.endswith("+") and kl_penalty not in ("mse+", "k2+"):
            # the host's gradient is that of k2 also where the value is clamped, which `straight_through` is not
            k2 = ops.kl(logprob, ref_logprob, kind="k2")
            value = k2 - k2.detach() + value.detach()
        return value.to(logprob.dtype)

    return replacement


def kl_calls(sizes: Sizes) -> Iterator[Call]:
    make = inputs(sizes)
    a, b = make.batch(4.0), make.batch(4.0)
    far = make.batch(60.0)
    for name in ("low_var_kl", *(n for n in KINDS if n != "low_var_kl")):
        for suffix in ("", "+"):
            # 0.7 hands the name on with its plus, and raises
            yield Call(name + suffix, (a, b, name + suffix), grads=(0, 1), lacks=NotImplementedError if suffix else None)
    for name in ("k1", "low_var_kl", "low_var_kl+") if sizes.dtype == torch.float32 else ():
        lacks = NotImplementedError if name.endswith("+") else None
        yield Call(f"{name} where clamps bite", (far, b, name), grads=(0,), lacks=lacks)
    if sizes == Sizes():
        yield Call("bfloat16", (a.bfloat16(), b.bfloat16(), "low_var_kl"), tolerance=6e-2)
        yield Call("full", (a, b, "full"), raises=NotImplementedError)


# --- vocabulary cut over ranks -----------------------------------------------------------------------------------------------


def tensor_parallel_group() -> Any:
    return importlib.import_module("megatron.core.parallel_state").get_tensor_model_parallel_group()


def parallel_logprobs(original: Any) -> Any:
    @in_place_of(original)
    def replacement(logits: Tensor, labels: Tensor) -> Tensor:
        reason = obstacle(logits)
        if reason is not None:
            decline("verl vocab_parallel_log_probs_from_logits", reason)
            return original(logits, labels)
        return semantics.logprobs(logits, labels, dtype=torch.float32, vocab_parallel=tensor_parallel_group())

    return replacement


def parallel_entropy(original: Any) -> Any:
    @in_place_of(original)
    def replacement(vocab_parallel_logits: Tensor) -> Tensor:
        reason = obstacle(vocab_parallel_logits)
        if reason is not None:
            decline("verl vocab_parallel_entropy", reason)
            return original(vocab_parallel_logits)
        return semantics.entropy(vocab_parallel_logits, vocab_parallel=tensor_parallel_group())

    return replacement


def parallel_entropy_with_chunking(original: Any) -> Any:
    @in_place_of(original)
    def replacement(vocab_parallel_logits: Tensor, chunk_size: int = 2048) -> Tensor:
        reason = obstacle(vocab_parallel_logits)
        if reason is not None:
            decline("verl vocab_parallel_entropy_with_chunking", reason)
            return original(vocab_parallel_logits, chunk_size)
        return semantics.entropy(vocab_parallel_logits, dtype=torch.float32, vocab_parallel=tensor_parallel_group())

    return replacement


PARALLEL = "verl.utils.megatron.tensor_parallel"
RANKS = "it needs megatron-core and its process groups; the tests compare it on two ranks with a stand-in for those"

SEAMS: tuple[Seam | Entry, ...] = (
    Seam(FUNCTIONAL, "logprobs_from_logits_v2", logprobs_v2, batch_logits_calls, "logprobs"),
    Seam(
        FUNCTIONAL, "logprobs_from_logits_flash_attn", logprobs_flash, None, "logprobs",
        unverified="it needs flash-attn and a GPU; verl calls it only where flash-attn is installed",
    ),
    Seam(FUNCTIONAL, "entropy_from_logits", entropy, logits_calls(False, 0.1), "logprobs"),
    Seam(FUNCTIONAL, "entropy_from_logits_with_chunking", entropy_with_chunking, logits_calls(False, 2e-3, 2e-6), "logprobs"),
    Seam(FUNCTIONAL, "masked_sum", masked_sum, statistics_calls(True, False, True), "masked_mean"),
    Seam(FUNCTIONAL, "masked_mean", masked_mean, statistics_calls(True, False, True), "masked_mean"),
    Seam(FUNCTIONAL, "masked_var", masked_var, statistics_calls(False, True, False), "masked_var"),
    Seam(FUNCTIONAL, "masked_whiten", masked_whiten, whiten_calls, "whiten"),
    Seam(ALGORITHMS, "compute_gae_advantage_return", gae, gae_calls, "gae", ("ADV_ESTIMATOR_REGISTRY",)),
    *GROUP_SEAMS,
    Seam(ALGORITHMS, "compute_value_loss", value_loss, value_loss_calls, "value_loss"),
    Seam(ALGORITHMS, "kl_penalty", kl_penalty, kl_calls, "kl"),
    *LOSS_ENTRIES,
    *LINEAR_SEAMS,
    Seam(
        PARALLEL, "vocab_parallel_log_probs_from_logits", parallel_logprobs, None, "logprobs", on_import=True,
        unverified=RANKS,
    ),
    Seam(PARALLEL, "vocab_parallel_entropy", parallel_entropy, None, "logprobs", on_import=True, unverified=RANKS),
    Seam(
        PARALLEL, "vocab_parallel_entropy_with_chunking", parallel_entropy_with_chunking, None, "logprobs", on_import=True,
        unverified=RANKS,
    ),
)  # fmt: skip
HOST = Host("verl", "verl", "verl", ("0.7", "0.9"), SEAMS)
