"""Scoring under the policy and the reference together, from the hidden states of both."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.kl.reference import DIRECTIONS, KINDS
from ..kernels.linear_logprobs import chunked
from ..kernels.linear_logprobs.chunked import Tile
from . import checks
from .backend import empty, result_dtype
from .kl import kl, kl_full
from .linear_logprobs import WORKSPACE, linear_logprobs


class Scores(NamedTuple):
    """Per row, float32: log-probs of the labels under the policy and the reference, the policy's entropy, the KL."""

    logprobs: Tensor
    entropy: Tensor
    ref_logprobs: Tensor
    kl: Tensor


@torch.no_grad()
def linear_scores(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref: tuple[Tensor, Tensor],
    *,
    kind: str = "k3",
    direction: str = "reverse",
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    vocab_parallel: Any = None,
    workspace_bytes: int = WORKSPACE,
    backend: str | None = None,
) -> Scores:
    """What a rollout is scored with, without gradient and without stored logits: `linear_logprobs` of the policy and of the
    reference, and the KL between them.

    Args:
        hidden, weight, bias: of the policy, as for `linear_logprobs`.
        labels: (...), one a row.
        ref: (hidden (..., H'), weight (V, H')) of the reference, whose width may be another; ref_bias: (V).
        kind: of the KL: "k1", "abs", "k2", "k3" of the labels' log-probs, as `kl`; "full": over the whole vocabulary, as
            `kl_full`, of `direction` "reverse" KL(policy || ref), "forward" KL(ref || policy) or "js". The logits of as many
            rows as the workspace holds of both are then there at a time.
        temperature, softcap, ignore_index, vocab_parallel, workspace_bytes, backend: as for `linear_logprobs`. "full" takes no
            shards of the vocabulary.

    Returns:
        `Scores(logprobs, entropy, ref_logprobs, kl)`, each (...) in nats; rows with ignore_index are 0.

    Raises:
        TypeError, ValueError, IndexError: as `linear_logprobs`, naming the argument.
    """
    checks.one_of("kind", kind, (*KINDS, "full"))
    checks.one_of("direction", direction, DIRECTIONS)
    if not (isinstance(ref, tuple) and len(ref) == 2):
        raise TypeError(f"ref: expected (hidden, weight), got {type(ref).__name__}")
    ref_hidden, ref_weight = ref
    checks.logits("ref hidden", ref_hidden)
    checks.logits("ref weight", ref_weight)
    if ref_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(f"ref hidden: expected {checks.shape_of(hidden)} but for its width, got {checks.shape_of(ref_hidden)}")
    if ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(f"ref weight: expected the policy's {weight.shape[0]} rows, got {checks.shape_of(ref_weight)}")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels: expected shape {tuple(hidden.shape[:-1])}, got {checks.shape_of(labels)}")
    if kind == "full" and vocab_parallel is not None:
        raise ValueError("vocab_parallel: the full KL needs the whole vocabulary; kind k1, abs, k2 or k3 does not")
    options: dict[str, Any] = {
        "temperature": temperature, "softcap": softcap, "ignore_index": ignore_index, "vocab_parallel": vocab_parallel,
        "workspace_bytes": workspace_bytes, "backend": backend,
    }  # fmt: skip
    policy = linear_logprobs(hidden, weight, labels, bias=bias, entropy=True, **options)
    reference = linear_logprobs(ref_hidden, ref_weight, labels, bias=ref_bias, **options)
    assert policy.entropy is not None
    if kind != "full":
        estimate = kl(policy.logprobs, reference.logprobs, kind=kind, backend="reference" if backend == "cuda" else backend)
    else:
        heads = ((hidden, weight, bias), (ref_hidden, ref_weight, ref_bias))
        estimate = _full(heads, labels != ignore_index, direction, temperature, softcap, workspace_bytes, backend)
    return Scores(policy.logprobs, policy.entropy, reference.logprobs, estimate)


def _full(
    heads: Any,
    mask: Tensor,
    direction: str,
    temperature: float,
    softcap: float | None,
    workspace_bytes: int,
    backend: str | None,
) -> Tensor:
    lead, vocab = mask.shape, heads[0][1].shape[0]
    out = empty((mask.numel(),), result_dtype(heads[0][0]), mask)
    height = max(1, workspace_bytes // (2 * 4 * vocab))
    for top in range(0, mask.numel(), height):
        rows = slice(top, min(top + height, mask.numel()))
        x, y = (_logits(h.reshape(-1, h.shape[-1]), w, b, rows, softcap) for h, w, b in heads)
        counted = mask.reshape(-1)[rows]
        out[rows] = kl_full(x, y, direction=direction, temperature=temperature, mask=counted, backend=backend)
    return out.view(lead)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: slice, softcap: float | None) -> Tensor:
    if hidden.dtype == torch.float64:
        x = hidden[rows] @ weight.T if bias is None else hidden[rows] @ weight.T + bias
    else:
        x = chunked.logits(hidden, weight, bias, Tile(rows, slice(0, weight.shape[0])))
    return x if softcap is None else x.div_(softcap).tanh_().mul_(softcap)
