"""Distillation from the largest logits that a teacher left for each token."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.kl import reference
from . import checks, value_checks
from .backend import choose, flat, result_dtype
from .distributed import all_reduce_sum
from .kl import kl_full
from .logprobs import VocabParallel, vocab_parallel_columns
from .masked_stats import masked_mean
from .reduction import divided, global_denominator
from .sequence_logprobs import sequence_logprobs
from .stats import LossStats

_STATS = ("kl", "agreement", "tokens")
_NAMES = {"backward": "reverse"}


class DistillLoss(NamedTuple):
    """`loss` 0-dim and `losses` (...), one a token, both differentiable; `stats` a `LossStats`."""

    loss: Tensor
    losses: Tensor
    stats: LossStats


def topk_distill_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    teacher_ids: Tensor | None,
    mask: Tensor | None = None,
    *,
    direction: str = "forward",
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    denominator: float | Tensor | None = None,
    group: Any = None,
    vocab_parallel: Any = None,
    backend: str | None = None,
) -> DistillLoss:
    """KL divergence between teacher and student on the teacher's K largest logits, both renormalised to them.

    With x the student's logits at teacher_ids, P = softmax(x / temperature), Q = softmax(teacher_logits / teacher_temperature)
    over the K columns::

        forward KL(Q||P) = Σ Q log(Q/P)        reverse KL(P||Q) = Σ P log(P/Q)

    and `loss` their mean over the tokens that count. K of a row's V logits are read. What is multiplied with the square of the
    temperature elsewhere is not here.

    Straight from hidden states, with no logit made but the K of each row (CPU; on a GPU tiles of logits); every id must be a
    column there, those of masked rows too::

        indptr = torch.arange(0, ids.numel() + 1, ids.shape[-1], device=ids.device)
        x = fastrlhf.linear_logprobs(hidden, weight, ids, kept=(indptr, ids.flatten())).logprobs
        fastrlhf.topk_distill_loss(x, teacher_logits, None)

    Args:
        logits: (..., V), or with vocab_parallel this rank's columns, or with teacher_ids None (..., K), the student's logits or
            log-probs at the teacher's ids; floating, last stride 1.
        teacher_logits: (..., K), floating, last stride 1; logits or log-probs. An entry of -inf is not there,
            whatever its id; a row that counts needs one that is. No gradient.
        teacher_ids: (..., K), int32 or int64, their columns of the whole vocabulary, each once in a row.
        mask: (...), bool or weights; rows of weight 0 give 0 and no gradient, and may hold anything. None counts all.
        direction: "forward", or "reverse", also called "backward".
        temperature: in [1e-20, 1e20], the student's.
        teacher_temperature: the teacher's; None: the same.
        denominator: what the sum is divided by instead of the local weight: the whole batch's.
        group: a process group over whose weights the denominator is taken.
        vocab_parallel: a process group (equal shards in rank order) or a `VocabParallel`. One all-gather of 4K bytes a row
            forward, nothing backward; all ranks get the same bits.
        backend: "triton", "cpu" or "reference"; None chooses.

    Returns:
        `DistillLoss(loss, losses, stats)`, float32 (float64 for float64 logits), in nats. stats, over the tokens that count:
        kl (mean), agreement (of the largest of the K with the teacher's), tokens (their number).

    Raises:
        TypeError, ValueError: dtype, shape or device that do not fit, an unknown direction, a temperature not > 0.
        IndexError: an id outside the vocabulary in a row that counts (on a GPU with FASTRLHF_CHECK=1).

    Source: Hinton et al. 2015; top-k as in NeMo-Aligner's knowledge distillation.
    """
    lead = checks.logits("logits", logits)[:-1]
    k = checks.logits("teacher_logits", teacher_logits)[-1]
    if teacher_logits.shape[:-1] != lead:
        raise ValueError(f"teacher_logits: expected shape ({_dims(lead)}K), got {checks.shape_of(teacher_logits)}")
    checks.same_device("teacher_logits", teacher_logits, "logits", logits)
    parallel = None if vocab_parallel is None else vocab_parallel_columns(vocab_parallel, logits.shape[-1])
    if teacher_ids is not None:
        checks.like("teacher_ids", teacher_ids, "teacher_logits", teacher_logits, (torch.int32, torch.int64))
    elif parallel:
        raise ValueError("teacher_ids: None, where logits hold the student's K already, goes without vocab_parallel")
    elif logits.shape[-1] != k:
        raise ValueError(f"logits: expected shape ({_dims(lead)}{k}) without teacher_ids, got {checks.shape_of(logits)}")
    if mask is not None:
        checks.tensor("mask", mask, checks.MASKS)
        if mask.shape != lead:
            raise ValueError(f"mask: expected shape {tuple(lead)}, got {checks.shape_of(mask)}")
        checks.same_device("mask", mask, "logits", logits)
    direction = _NAMES.get(direction, direction)
    checks.one_of("direction", direction, reference.DIRECTIONS[:2])
    checks.temperature(temperature)
    if teacher_temperature is None:
        teacher_temperature = temperature
    checks.temperature(teacher_temperature, "teacher_temperature")
    over = global_denominator(denominator, teacher_logits[..., 0], mask, None, "token-mean", group)
    backend = choose("topk_distill_loss", logits, backend)
    dtype = result_dtype(logits)
    counted = None if mask is None else mask != 0

    there = teacher_logits != -torch.inf
    if teacher_ids is None:
        x = logits.to(dtype)
    else:
        ids = torch.where(there if counted is None else there & counted.unsqueeze(-1), teacher_ids.long(), 0)
        if backend in ("cpu", "reference") or value_checks.wanted(backend):
            value_checks.ids("teacher_ids", ids, parallel.vocab_size if parallel else logits.shape[-1])
        x = _columns(logits, ids, parallel, dtype)
    with torch.no_grad():
        t = teacher_logits.to(dtype)
        if teacher_temperature != temperature:  # `kl_full` has one: differences are scaled, so that an offset costs nothing
            t = (t - t.amax(-1, keepdim=True)) * (temperature / teacher_temperature)
    x = torch.where(there, x, -torch.inf)
    losses = kl_full(x, t, direction=direction, temperature=temperature, mask=counted, backend=backend)
    if over is None:
        loss = masked_mean(losses, mask, backend=backend)
    else:
        (total,) = sequence_logprobs(flat(losses), None if mask is None else flat(mask), backend=backend)
        loss = divided(total, over)
    with torch.no_grad():
        same = (x.argmax(-1) == t.argmax(-1)).to(dtype)
        n = losses.new_full((), losses.numel()) if counted is None else counted.sum().to(dtype)
        means = [masked_mean(v, counted, backend=backend) for v in (losses.detach(), same)]
    return DistillLoss(loss, losses, LossStats(torch.stack([*means, n]).float(), _STATS))


def _dims(lead: torch.Size) -> str:
    return "".join(f"{n}, " for n in lead)


def _columns(logits: Tensor, ids: Tensor, parallel: VocabParallel | None, dtype: torch.dtype) -> Tensor:
    """Some columns of each row; across ranks each comes from the one that has it, whose gradient it is."""
    if parallel is None:
        return logits.gather(-1, ids).to(dtype)
    local = ids - parallel.vocab_start
    mine = (local >= 0) & (local < logits.shape[-1])
    x = logits.gather(-1, torch.where(mine, local, 0)).to(dtype)
    everywhere = all_reduce_sum(torch.where(mine, x.detach(), 0.0), parallel.group)
    return torch.where(mine, x, everywhere)
