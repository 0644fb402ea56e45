"""The definitions of the token-level KL estimators and of the full-vocabulary KL."""

from __future__ import annotations

import torch
from torch import Tensor

from ..logprobs.reference import compute_dtype

KINDS = ("k1", "abs", "k2", "k3")
DIRECTIONS = ("forward", "reverse", "js")


def kl(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    kind: str = "k3",
    clamp_input: float | None = None,
    clamp_output: float | None = None,
    straight_through: bool = False,
) -> Tensor:
    """Schulman's estimators of KL(policy || ref) from samples: with d = logprobs - ref_logprobs, k1 d, abs |d|,
    k2 d²/2, k3 e^(-d) - 1 + d."""
    dtype = compute_dtype(logprobs, ref_logprobs)
    d = logprobs.to(dtype) - ref_logprobs.to(dtype)
    if clamp_input is not None:
        d = d.clamp(-clamp_input, clamp_input)
    if kind == "k1":
        value = d
    elif kind == "abs":
        value = d.abs()
    elif kind == "k2":
        value = d * d / 2
    else:
        value = torch.expm1(-d) + d
    if clamp_output is not None:
        value = value.clamp(-clamp_output, clamp_output)
    if straight_through:
        k2 = d * d / 2
        value = k2 + (value - k2).detach()
    return value


def kl_full(
    logits: Tensor, ref_logits: Tensor, *, direction: str = "forward", temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """forward KL(ref || policy), reverse KL(policy || ref), js their Jensen-Shannon divergence, over the vocabulary."""
    dtype = compute_dtype(logits, ref_logits)

    def log_softmax(x: Tensor) -> Tensor:
        x = x.to(dtype)
        if mask is not None:
            x = torch.where((mask != 0).unsqueeze(-1), x, torch.zeros_like(x))
        return torch.log_softmax((x - x.detach().amax(-1, keepdim=True)) / temperature, -1)

    def divergence(p: Tensor, q: Tensor) -> Tensor:
        """Σ p log(p/q) of log-probabilities, where p = 0 counts nothing."""
        empty = p == -torch.inf
        p_, q_ = torch.where(empty, torch.zeros_like(p), p), torch.where(empty, torch.zeros_like(q), q)
        return torch.where(empty, torch.zeros_like(p), p_.exp() * (p_ - q_)).sum(-1)

    p, q = log_softmax(logits), log_softmax(ref_logits)
    if direction == "forward":
        out = divergence(q, p)
    elif direction == "reverse":
        out = divergence(p, q)
    else:
        # log((P + Q) / 2); where both are 0 neither divergence looks
        both = (p == -torch.inf) & (q == -torch.inf)
        m = torch.logaddexp(torch.where(both, torch.zeros_like(p), p), torch.where(both, torch.zeros_like(q), q))
        m = m - torch.log(torch.tensor(2.0, dtype=dtype))
        out = (divergence(p, m) + divergence(q, m)) / 2
    return out if mask is None else torch.where(mask != 0, out, torch.zeros_like(out))
