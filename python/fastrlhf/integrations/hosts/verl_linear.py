"""verl's log-probs from hidden states, without logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ..seam import Call, Entry, Seam, Sizes, decline, obstacle
from .inputs import inputs


def fused_linear(original: Any) -> Any:
    """In the place of the autograd function: a class with its `apply`."""
    rounds = _rounds(original)

    class FusedLinear:
        __fastrlhf__ = True

        @staticmethod
        def apply(
            hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: Any = 1.0, chunk_size: int = 512
        ) -> tuple[Tensor, Tensor]:
            reason = obstacle(hidden_states, "linear_logprobs") or obstacle(vocab_weights, "linear_logprobs")
            if reason is None and hidden_states.dtype != vocab_weights.dtype:
                reason = f"hidden states of {hidden_states.dtype} and weights of {vocab_weights.dtype}"
            if reason is not None:
                decline("verl FusedLinearForPPOFunction", reason)
                return original.apply(hidden_states, vocab_weights, input_ids, temperature, chunk_size)
            out = ops.linear_logprobs(hidden_states, vocab_weights, input_ids, temperature=temperature, entropy=True)
            assert out.entropy is not None
            dtype = hidden_states.dtype
            return out.logprobs.to(dtype if rounds else torch.float32), out.entropy.to(dtype)

    FusedLinear.__name__ = FusedLinear.__qualname__ = original.__name__
    FusedLinear.__module__ = original.__module__
    return FusedLinear


@torch.no_grad()
def _rounds(original: Any) -> bool:
    """Whether log-probs come in the dtype of the hidden states: before 0.8."""
    x = torch.zeros(1, 2, dtype=torch.bfloat16)
    return bool(original.apply(x, x, torch.zeros(1, dtype=torch.long))[0].dtype == torch.bfloat16)


def fused_linear_calls(sizes: Sizes) -> Iterator[Call]:
    make = inputs(sizes)
    w = make.head()
    for lead in ((sizes.rows * 4,), (sizes.rows, sizes.length)):
        h, y = make.normal(*lead, sizes.hidden), make.labels(*lead)
        for temperature in (1.0, 0.7):
            name = f"{lead} rows, temperature {temperature}"
            yield Call(
                name, (h, w, y, temperature), grads=(0, 1), tolerance=_tolerance(h), definition=_logprobs_and_entropy
            )  # fmt: skip
    if sizes == Sizes():
        yield Call("bfloat16", (h.bfloat16(), w.bfloat16(), y), grads=(0,), tolerance=0.2)


def _logprobs_and_entropy(h: Tensor, w: Tensor, y: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logprobs = (h @ w.t() / temperature).log_softmax(-1)
    return logprobs.gather(-1, y.unsqueeze(-1)).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)


def _tolerance(h: Tensor) -> float | None:
    return 0.2 if h.dtype in (torch.bfloat16, torch.float16) else 1e-4


def linear_cross_entropy(original: Any) -> Any:
    """In the place of `LinearCrossEntropy.apply`, which modules import by name."""

    def replacement(
        hidden: Tensor, weight: Tensor, labels: Tensor, temperature: Any = 1.0, reduction: str = "none",
        dist_process_group: Any = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        reason = obstacle(hidden, "linear_logprobs") or (
            f"reduction {reason_}" if (reason_ := reduction.lower()) != "none" else None
        )
        if reason is not None:
            decline("verl linear_cross_entropy", reason)
            return original(hidden, weight, labels, temperature, reduction, dist_process_group)
        flat = hidden.reshape(-1, hidden.shape[-1])
        out = ops.linear_logprobs(
            flat, weight, labels.reshape(-1), temperature=temperature, entropy=True, vocab_parallel=dist_process_group
        )
        assert out.entropy is not None
        return out.logprobs.float(), out.entropy.float()

    replacement.__fastrlhf__ = True  # type: ignore[attr-defined]
    return replacement


LINEAR_SEAMS: tuple[Seam | Entry, ...] = (
    Seam(
        "verl.utils.experimental.torch_functional", "FusedLinearForPPOFunction", fused_linear, fused_linear_calls,
        "linear_logprobs", on_import=True, function=lambda held: held.apply,
    ),
    Seam(
        "verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy", linear_cross_entropy, None, "linear_logprobs",
        on_import=True, unverified="the host's kernel needs a GPU",
    ),
)  # fmt: skip
