"""SteerLM 2.0: an attribute-conditioned policy matched to what the attribute model says of its own samples."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.preference_loss import reference
from . import checks
from .reduction import divided, given_denominator
from .stats import LossStats

_STATS = ("distance", "effective_responses")


class SteerLM2Loss(NamedTuple):
    """`loss` 0-dim and `losses` (P), one a prompt, both differentiable; `stats` a `LossStats`."""

    loss: Tensor
    losses: Tensor
    stats: LossStats


def steerlm2_loss(
    logprobs: Tensor,
    proposal_logprobs: Tensor,
    attribute_logprobs: Tensor,
    prior_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    denominator: float | Tensor | None = None,
) -> SteerLM2Loss:
    """Negative log-likelihood of n responses to each prompt, weighted by how much more of each the optimal policy wants.

    The optimal policy is P(y | a, x) ∝ P(a | x, y) P(y | x); the responses were sampled from a proposal Q'. Over the n of a
    prompt, with constants w and b::

        w = softmax(log P(a|x,y) + log P(y|x) - log Q'(y|a,x))        b = softmax(log Q(y|a,x) - log Q'(y|a,x))

        loss of a prompt = Σ (w - b) (-log Q(y|a,x))

    which has the gradient of KL(w || b). `loss` is the mean over prompts; NeMo-Aligner divides by the mean number of tokens of
    a response as well: `denominator=prompts * tokens`. P numbers: plain PyTorch on any device, nothing waits for it.

    Args:
        logprobs: (P, n), log Q(y|a,x), sums over a response's tokens; floating. The gradient flows to it alone.
        proposal_logprobs: (P, n), log Q'(y|a,x), of the policy that sampled.
        attribute_logprobs: (P, n), log P(a|x,y), of the attribute model.
        prior_logprobs: (P, n), log P(y|x), of the model without attributes.
        mask: (P, n), != 0 where there is a response; the others may hold anything. A prompt without any gives 0.
        denominator: what the sum over prompts is divided by instead of P.

    Returns:
        `SteerLM2Loss(loss, losses, stats)`, float32 (float64 for float64 logprobs). stats, means over prompts with a response:
        distance KL(w || b) in nats, effective_responses 1 / Σ w², between 1 and n.

    Raises:
        TypeError, ValueError: dtype, shape or device that do not fit.

    Source: Wang et al. 2024, "HelpSteer2", on SteerLM 2.0.
    """
    checks.tensor("logprobs", logprobs)
    if logprobs.dim() != 2 or logprobs.shape[1] < 1:
        raise ValueError(f"logprobs: expected shape (P, n) with n >= 1, got {checks.shape_of(logprobs)}")
    checks.like("proposal_logprobs", proposal_logprobs, "logprobs", logprobs)
    checks.like("attribute_logprobs", attribute_logprobs, "logprobs", logprobs)
    checks.like("prior_logprobs", prior_logprobs, "logprobs", logprobs)
    if mask is not None:
        checks.like("mask", mask, "logprobs", logprobs, checks.MASKS)
    over = given_denominator(denominator, logprobs, max(logprobs.shape[0], 1))
    inputs = (logprobs, proposal_logprobs, attribute_logprobs, prior_logprobs)
    losses, distance, effective = reference.steerlm2_losses(*inputs, mask)
    loss = divided(losses.sum(), over)
    prompts = max(logprobs.shape[0], 1) if mask is None else (mask != 0).any(-1).sum().clamp(min=1)
    values = torch.stack([distance.sum(), effective.sum()]) / prompts
    return SteerLM2Loss(loss, losses, LossStats(values.float(), _STATS))
