"""Scoring under the policy and the reference together, from the hidden states of both."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.kl.reference import DIRECTIONS, KINDS
from ..kernels.linear_logprobs import reference
from . import checks, value_checks
from .backend import result_dtype
from .head_blocks import blocks, in_rows, multiply_out, of_rows
from .kl import kl, kl_full
from .linear_logprobs import WORKSPACE, HeadCall, Results, head_inputs, linear_logprobs
from .logprobs import of_logits, softmax_options


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
    temperature: float | Tensor = 1.0,
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
            rows as the workspace holds of both are then there at a time, from the one product that the log-probs come from.
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
    if kind == "full":
        return _full((hidden, weight, bias), (ref_hidden, ref_weight, ref_bias), labels, direction, **options)
    policy = linear_logprobs(hidden, weight, labels, bias=bias, entropy=True, **options)
    reference_ = linear_logprobs(ref_hidden, ref_weight, labels, bias=ref_bias, **options)
    assert policy.entropy is not None
    estimate = kl(policy.logprobs, reference_.logprobs, kind=kind, backend=_of_kl(backend))
    return Scores(policy.logprobs, policy.entropy, reference_.logprobs, estimate)


def _of_kl(backend: str | None) -> str | None:
    """The KLs have no CUDA kernel."""
    return "reference" if backend == "cuda" else backend


Head = tuple[Tensor, Tensor, Tensor | None]


def _full(
    policy: Head, ref: Head, labels: Tensor, direction: str, temperature: float | Tensor, softcap: float | None,
    ignore_index: int, vocab_parallel: None, workspace_bytes: int, backend: str | None,
) -> Scores:  # fmt: skip
    """Some rows at a time, both heads multiplied out once: their statistics, and the KL of the logits that are left."""
    calls = []
    for head in (policy, ref):  # a quarter of the workspace: the logits of both, as they come and in rows
        call, name = _call(*head, labels, temperature, softcap, ignore_index, workspace_bytes // 4, backend)
        calls.append(call)
    if ref[0].dtype != policy[0].dtype and torch.float64 in (ref[0].dtype, policy[0].dtype):
        raise TypeError(f"ref hidden: {ref[0].dtype} with hidden {policy[0].dtype}; float64 goes with float64 only")
    dtype = result_dtype(policy[0])
    out = [torch.zeros(labels.numel(), dtype=dtype, device=policy[0].device) for _ in range(4)]
    for rows in blocks(max(calls, key=lambda c: c.hidden.shape[-1]), name, 1):
        (of, x), (of_ref, y) = (_multiplied_out(of_rows(c, rows), name) for c in calls)
        divergence = kl_full(
            x, y, direction=direction, temperature=calls[0].temperature, mask=calls[0].labels.reshape(-1)[rows] != ignore_index,
            backend=_of_kl(backend),
        )  # fmt: skip
        assert of.entropy is not None
        for to, part in zip(out, (of.logprobs, of.entropy, of_ref.logprobs, divergence), strict=True):
            to[rows] = part
    return Scores(*(t.view(labels.shape) for t in out))


def _call(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, temperature: float | Tensor, softcap: float | None,
    ignore_index: int, workspace_bytes: int, backend: str | None,
) -> tuple[HeadCall, str]:  # fmt: skip
    name = head_inputs("linear_logprobs", hidden, weight, bias, max(workspace_bytes, 1), torch.float32, torch.float32, backend)
    vocab = weight.shape[0]
    temperature, temperatures, _ = softmax_options(
        "hidden", hidden, hidden.shape[:-1], vocab, labels, temperature, softcap, None, None
    )
    if value_checks.wanted(name):
        value_checks.labels(labels, vocab, ignore_index)
        value_checks.temperatures(temperatures)
    bias = None if bias is None else bias.contiguous()
    return HeadCall(
        hidden, weight, bias, labels.contiguous(), temperatures, None, None, None, float(temperature), softcap or 0.0,
        ignore_index, 0, vocab, max(workspace_bytes, 1), False, False,
    ), name  # fmt: skip


def _multiplied_out(call: HeadCall, backend: str) -> tuple[Results, Tensor]:
    """Results, and logits (rows, V), soft-capped; divided by the temperature where every row has its own."""
    if backend == "reference":
        x = reference.logits(call.hidden, call.weight, call.bias, call.ignored.squeeze(1))
        lp, entropy, lse = of_logits(
            x, call.labels, call.temperatures, call.temperature, call.softcap or None, call.ignore_index, True, True, None, None
        )
        results = Results(lp, entropy, lse, None, None)
    else:
        results, kept = multiply_out(call, None, backend)
        assert isinstance(kept, Tensor)
        x = in_rows(kept, call.rows, call.weight.shape[0]) if backend == "cpu" else kept
    if call.softcap != 0 and backend != "cpu":
        x = x.div_(call.softcap).tanh_().mul_(call.softcap)
    if call.temperatures is not None:
        x = x.sub_(x.amax(-1, keepdim=True)).div_(call.temperatures.to(x.dtype)[:, None])
    return results, x
