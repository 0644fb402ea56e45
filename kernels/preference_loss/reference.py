"""The definitions of the preference, reward and regression losses and of the sequence log-probs under them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..gae.reference import unpack
from ..logprobs.reference import compute_dtype
from ..masked_stats.reference import masked_mean, weighted

KINDS = ("dpo", "robust", "ipo", "hinge", "rpo_sq", "rpo_fwd_kl", "rpo_bwd_kl", "simpo", "orpo", "kto")
REWARD_KINDS = ("bt", "margin_bt", "scaled_bt")


def bernoulli_kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(Bernoulli(σ(a)) || Bernoulli(σ(b)))."""
    return torch.sigmoid(a) * (F.logsigmoid(a) - F.logsigmoid(b)) + torch.sigmoid(-a) * (F.logsigmoid(-a) - F.logsigmoid(-b))


def log_odds(x: Tensor) -> Tensor:
    """log(p / (1 - p)) of a log-probability x < 0."""
    return x - torch.log(-torch.expm1(x))


def preference_losses(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    *,
    kind: str,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    chosen_rewards: Tensor | None = None,
    rejected_rewards: Tensor | None = None,
    reward_scale: float = 1.0,
    margin: float = 0.0,
    kl_baseline: float | Tensor = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """One loss a pair: see `fastrlhf.preference_loss`."""
    dtype = compute_dtype(chosen, rejected)
    c, r = chosen.to(dtype), rejected.to(dtype)
    if ref_chosen is not None and ref_rejected is not None:
        c, r = c - ref_chosen.to(dtype), r - ref_rejected.to(dtype)
    x, e = beta * (c - r), label_smoothing
    g = torch.zeros_like(x)
    if chosen_rewards is not None and rejected_rewards is not None:
        g = reward_scale * (chosen_rewards.to(dtype) - rejected_rewards.to(dtype))
    if kind == "dpo":
        return -(1 - e) * F.logsigmoid(x) - e * F.logsigmoid(-x)
    if kind == "robust":
        return (-(1 - e) * F.logsigmoid(x) + e * F.logsigmoid(-x)) / (1 - 2 * e)
    if kind == "ipo":
        return (c - r - 1 / (2 * beta)) ** 2
    if kind == "hinge":
        return F.relu(1 - x)
    if kind == "rpo_sq":
        return (x - g) ** 2
    if kind == "rpo_fwd_kl":
        return bernoulli_kl(x, g)
    if kind == "rpo_bwd_kl":
        return bernoulli_kl(g, x)
    if kind == "simpo":
        return -(1 - e) * F.logsigmoid(x - margin) - e * F.logsigmoid(margin - x)
    if kind == "orpo":
        return -beta * F.logsigmoid(log_odds(c) - log_odds(r))
    good = desirable_weight * (1 - torch.sigmoid(beta * (c - kl_baseline)))
    bad = undesirable_weight * (1 - torch.sigmoid(beta * (kl_baseline - r)))
    return 0.5 * (good + bad)


def reward_losses(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, *, kind: str = "bt") -> Tensor:
    """bt -log σ(c - r), margin_bt -log σ(c - r - margin), scaled_bt -margin log σ(c - r)."""
    dtype = compute_dtype(chosen, rejected)
    x = chosen.to(dtype) - rejected.to(dtype)
    if kind == "bt" or margin is None:
        return -F.logsigmoid(x)
    m = margin.to(dtype)
    return -F.logsigmoid(x - m) if kind == "margin_bt" else -m * F.logsigmoid(x)


def regression_loss(predictions: Tensor, targets: Tensor, *, ignore_value: float = -100.0) -> Tensor:
    """Mean squared error over the targets that are not `ignore_value`; 0 where none is."""
    dtype = compute_dtype(predictions, targets)
    p, t = predictions.to(dtype), targets.to(dtype)
    counted = t != ignore_value
    return masked_mean((torch.where(counted, p, t) - t) ** 2, counted)


def steerlm2_losses(
    logprobs: Tensor, proposal_logprobs: Tensor, attribute_logprobs: Tensor, prior_logprobs: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each prompt: Σ (w - b) (-logprobs) over its responses, KL(w || b) and 1 / Σ w², with the constants
    w = softmax(attribute + prior - proposal), b = softmax(logprobs - proposal). In double: they are sums over sequences."""
    q, proposal = logprobs.double(), proposal_logprobs.detach().double()
    there = torch.ones_like(q, dtype=torch.bool) if mask is None else mask != 0
    some = there.any(-1, keepdim=True)

    def log_weights(x: Tensor) -> Tensor:
        return torch.log_softmax(torch.where(some, torch.where(there, x, -torch.inf), 0.0), -1)

    with torch.no_grad():
        log_w = log_weights(attribute_logprobs.double() + prior_logprobs.double() - proposal)
        log_b = log_weights(q - proposal)
        w, b = (torch.where(there, x.exp(), 0.0) for x in (log_w, log_b))
        distance = torch.where(w > 0, w * (log_w - log_b), 0.0).sum(-1)
        effective = torch.where(some.squeeze(-1), 1 / (w * w).sum(-1), 0.0)
    losses = -torch.where(w != b, (w - b) * q, 0.0).sum(-1)  # 0 where neither wants a response, be it impossible
    return losses.to(compute_dtype(logprobs)), distance, effective


def sequence_logprobs(
    logprobs: Tensor, mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None, average: bool = False
) -> Tensor:
    """Σ m_t logprobs_t of each sequence, over Σ m_t if average; 0 for a sequence without a counted token."""
    if cu_seqlens is not None:
        mask = unpack(torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask, cu_seqlens)
        logprobs = unpack(logprobs, cu_seqlens)
    if average:
        return masked_mean(logprobs, mask, -1)
    x, w = weighted(logprobs, mask)
    return (x * w).sum(-1)
