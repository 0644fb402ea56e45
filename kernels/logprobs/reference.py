"""The definition of `logprobs`: plain PyTorch, differentiable, in float32 or, for float64 logits, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any input is, float32 otherwise: no half-precision arithmetic anywhere."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def kept_mask(kept: Tensor | tuple[Tensor, Tensor], rows: int, vocab: int, start: int = 0) -> Tensor:
    """The kept set of each row as bool (rows, vocab), for the columns [start, start + vocab)."""
    if isinstance(kept, Tensor):
        return kept.reshape(rows, vocab)
    indptr, indices = kept
    mask = torch.zeros(rows, vocab, dtype=torch.bool, device=indices.device)
    row = torch.repeat_interleave(torch.arange(rows, device=indices.device), indptr.diff())
    column = indices - start
    inside = (column >= 0) & (column < vocab)
    mask[row[inside], column[inside].long()] = True
    return mask


def statistics(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor,
    softcap: float | None,
    ignore_index: int,
    kept: Tensor | tuple[Tensor, Tensor] | None,
    start: int = 0,
    partial: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of (N, V) logits and (N, K) labels: the maximum m, s = Σ e^((x-m)/T), t = Σ ((x-m)/T) e^((x-m)/T), the label
    logits x_y (-inf where the columns from `start` on do not hold the label), which labels count, and 1 / T. `partial`: these
    are some of the columns, and only -inf among them is a sum of 0, not NaN."""
    x = logits.to(compute_dtype(logits))
    counted = labels != ignore_index  # (N, K)
    x = torch.where(counted.any(-1, keepdim=True), x, torch.zeros_like(x))
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    column = labels.long() - start
    here = counted & (column >= 0) & (column < x.shape[-1])
    column = torch.where(here, column, torch.zeros_like(column))
    z = torch.where(here, x.gather(-1, column), torch.full_like(x[:, :1], -torch.inf))
    if kept is not None:
        keep = kept_mask(kept, x.shape[0], x.shape[1], start)
        keep = (
            keep.scatter(-1, column, keep.gather(-1, column) | here) if labels.shape[-1] == 1 else _keep_all(keep, column, here)
        )
        x = torch.where(keep, x, torch.full_like(x, -torch.inf))
    scale = 1 / temperature.to(x.dtype).reshape(-1, 1) if isinstance(temperature, Tensor) else 1 / temperature
    m = x.detach().amax(-1, keepdim=True)
    u = (x - (torch.where(m == -torch.inf, torch.zeros_like(m), m) if partial else m)) * scale
    e = torch.exp(u)
    t = (torch.where(e == 0, torch.zeros_like(u), u) * e).sum(-1, keepdim=True)
    return m, e.sum(-1, keepdim=True), t, z, counted, torch.as_tensor(scale, dtype=x.dtype)


def _keep_all(keep: Tensor, column: Tensor, here: Tensor) -> Tensor:
    for k in range(column.shape[-1]):
        c = column[:, k : k + 1]
        keep = keep.scatter(-1, c, keep.gather(-1, c) | here[:, k : k + 1])
    return keep


def results(m: Tensor, s: Tensor, t: Tensor, z: Tensor, counted: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs (N, K) = (x_y - m)/T - log s, entropy (N) = log s - t/s, lse (N) = m/T + log s; 0 where nothing counts."""
    row = counted.any(-1)
    logprobs = torch.where(counted, (z - m) * scale - s.log(), torch.zeros_like(z))
    entropy = (s.log() - t / s).squeeze(-1)
    lse = (m * scale + s.log()).squeeze(-1)
    zero = torch.zeros_like(lse)
    return logprobs, torch.where(row, entropy, zero), torch.where(row, lse, zero)


def logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    kept: Tensor | tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """log-probs (labels' shape), entropy and lse (the leading shape) of `labels` under softmax(softcap(logits) / T)."""
    vocab = logits.shape[-1]
    x = logits.reshape(-1, vocab)
    y = labels.reshape(x.shape[0], labels.shape[-1] if labels.dim() == logits.dim() else 1)
    out, entropy, lse = results(
        *statistics(x, y, temperature=temperature, softcap=softcap, ignore_index=ignore_index, kept=kept)
    )
    lead = logits.shape[:-1]
    return out.reshape(labels.shape), entropy.reshape(lead), lse.reshape(lead)
