"""A policy loss straight from logits: with its gradient in one read of them and one write, where a GPU holds rows on chip."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.policy_loss import reference
from ..kernels.policy_loss.reference import RolloutCorrection
from . import checks, value_checks
from .backend import (
    DTYPES,
    choose,
    cuda_extension,
    empty,
    matrix,
    raw_stream,
    row_shape,
    row_values,
    tokens,
    with_rows,
)
from .library import on_its_device
from .logprobs import logprobs, native_arguments
from .masked_stats import row_sums
from .policy_loss import Settings, policy_loss, settings
from .stats import LossStats

_BY_TOKEN = ("ppo", "reinforce", "cispo", "sapo")


class LogitsPolicyLoss(NamedTuple):
    """`loss` 0-dim, differentiable; `stats` a `LossStats`; `logprobs` and `entropy` of the tokens, without gradient."""

    loss: Tensor
    stats: LossStats
    logprobs: Tensor
    entropy: Tensor


def logits_policy_loss(
    logits: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    kind: str = "ppo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio_clamp: float | None = None,
    delta: float | None = None,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    rollout_logprobs: Tensor | None = None,
    rollout_correction: RolloutCorrection | str | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    entropy_coef: float = 0.0,
    reduction: str = "token-mean",
    denominator: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    group: Any = None,
    backend: str | None = None,
) -> LogitsPolicyLoss:
    """`policy_loss` of `logprobs(logits, labels)`; the same numbers to rounding.

    A token-level loss's gradient is known as soon as the row's log-prob is. On a Hopper GPU or later (CUDA backend) rows lie
    on chip while that is computed: one read and one write of the logits instead of two reads and a write. This needs a
    token-level kind and correction, reduction token-mean or token-sum, one label a row, no soft cap, and rows that start at
    16 bytes; anything else, every other backend and torch.compile run the two ops one after the other. Memory: one gradient of
    the logits; another for each backward that keeps the graph.

    Args:
        logits: (B, T, V), packed (total, V) with `cu_seqlens`, or (T, V); as for `logprobs`. The gradient flows to it only.
        labels: the leading shape, int32 or int64. A row with ignore_index has logprob 0 and no gradient.
        temperature, softcap, ignore_index: as for `logprobs`.
        mask: the leading shape; None counts every row whose label is not ignore_index.
        The rest: as for `policy_loss`; the entropy that entropy_coef weighs is the rows'.
        backend: "cuda", "triton", "cpu" or "reference"; None chooses.

    Returns:
        `LogitsPolicyLoss(loss, stats, logprobs, entropy)`, float32.

    Raises:
        TypeError, ValueError, IndexError: as the two ops.
    """
    lead = checks.logits("logits", logits)[:-1]
    if labels.shape != lead:
        raise ValueError(f"labels: expected shape {tuple(lead)}, got {checks.shape_of(labels)}")
    if mask is None:
        mask = labels != ignore_index
    backend = choose("logits_policy_loss", logits, backend)
    options: dict[str, Any] = {
        "kind": kind, "clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip, "ratio_clamp": ratio_clamp,
        "delta": delta, "tau_pos": tau_pos, "tau_neg": tau_neg, "rollout_logprobs": rollout_logprobs,
        "rollout_correction": rollout_correction, "ref_logprobs": ref_logprobs, "kl_coef": kl_coef, "kl": kl,
        "entropy_coef": entropy_coef, "reduction": reduction, "denominator": denominator, "cu_seqlens": cu_seqlens,
        "group": group,
    }  # fmt: skip
    if (
        backend == "cuda"
        and torch.is_grad_enabled()
        and logits.requires_grad
        and softcap is None
        and old_logprobs.shape == lead
        and not torch.compiler.is_compiling()
    ):
        checks.temperature(temperature)
        known = settings(old_logprobs, old_logprobs, advantages, mask, **(options | {"entropy": old_logprobs}))
        by_segment = cu_seqlens is not None and advantages.shape != old_logprobs.shape
        if not by_segment and _fits(logits, known, reduction):
            if value_checks.wanted(backend):
                value_checks.labels(labels, logits.shape[-1], ignore_index)
            rollout = rollout_logprobs, ref_logprobs
            loss, stats, lp, entropy = _OneRead.apply(
                logits, labels, old_logprobs, advantages, mask, *rollout, temperature, ignore_index, known, reduction, options
            )
            return LogitsPolicyLoss(loss, LossStats(stats, reference.STATS), lp, entropy)
    out = logprobs(
        logits, labels, temperature=temperature, softcap=softcap, ignore_index=ignore_index, entropy=True, backend=backend
    )
    assert out.entropy is not None
    result = policy_loss(out.logprobs, old_logprobs, advantages, mask, entropy=out.entropy, backend=backend, **options)
    return LogitsPolicyLoss(result.loss, result.stats, out.logprobs.detach(), out.entropy.detach())


def _fits(logits: Tensor, known: Settings, reduction: str) -> bool:
    by_token = known.kind in _BY_TOKEN and reduction in ("token-mean", "token-sum")
    if not by_token or (known.correction is not None and known.correction.level != "token"):
        return False
    module = cuda_extension()
    major = 9 if module.host else torch.cuda.get_device_capability(logits.device)[0]
    fits: bool = logits.numel() > 0 and module.one_read_fits(matrix(with_rows(logits)), logits.shape[-1], major)
    return fits


def _share(mask: Tensor, reduction: str, denominator: float | Tensor | None) -> Tensor:
    """What each token's gradient is multiplied by: float32, on the device."""
    if denominator is None and reduction == "token-sum":
        return torch.ones((), dtype=torch.float32, device=mask.device)
    if denominator is None:
        counted = mask if mask.is_floating_point() else mask.to(torch.float32)
        total = row_sums(counted.reshape(-1), None, False, backend="cuda")[0]
        return torch.where(total != 0, 1 / total, torch.zeros_like(total))
    if isinstance(denominator, Tensor):
        return (1 / denominator.double()).reshape(()).float()
    return torch.full((), 1 / denominator, dtype=torch.float32, device=mask.device)


def _used_again() -> bool:
    """Whether this backward keeps the graph; where torch (< 2.5) does not say, it may."""
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return kept is None or bool(kept())


class _OneRead(torch.autograd.Function):
    @staticmethod
    @on_its_device
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, rollout: Tensor | None,
        ref: Tensor | None, temperature: float, ignore_index: int, known: Settings, reduction: str, options: dict[str, Any],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        x, lead = with_rows(logits), logits.shape[:-1]
        share = _share(mask, reduction, known.denominator)
        lp, entropy = empty(lead, torch.float32, x), empty(lead, torch.float32, x)
        grad = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        call = native_arguments(logits, labels.contiguous(), temperature, ignore_index)
        per_row = advantages.shape != old.shape
        arrays = (
            None, tokens(old), row_values(advantages) if per_row else tokens(advantages), tokens(mask), tokens(rollout),
            tokens(ref), None,
        )  # fmt: skip
        cuda_extension().one_read(
            *call[:5], (lp.data_ptr(), entropy.data_ptr(), 0, 0, 0), row_shape(old, known.cu_seqlens), arrays,
            (*known.numbers, math.nan), tuple(known.codes), known.numbers[-1] != 0, share.data_ptr(), matrix(grad),
            raw_stream(x),
        )  # fmt: skip
        loss, stats = policy_loss(lp, old, advantages, mask, entropy=entropy, backend="cuda", **options)
        ctx.save_for_backward(grad)
        ctx.shape = logits.shape
        ctx.mark_non_differentiable(stats.values, lp, entropy)
        return loss, stats.values, lp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
        (grad,) = ctx.saved_tensors
        if _used_again():
            grad = grad.clone()
        factor = grad_loss.to(torch.float32)
        cuda_extension().rescale(grad.data_ptr(), factor.data_ptr(), grad.numel(), DTYPES[grad.dtype], raw_stream(grad))
        return grad.view(ctx.shape), *[None] * 11
