"""Log-probs of whole sequences: the fused segment sum under the preference losses."""

from __future__ import annotations

from torch import Tensor

from ..kernels.preference_loss import reference
from . import checks, value_checks
from .backend import choose
from .masked_stats import row_sums


def sequence_logprobs(
    logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    average: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Log-probs of sequences: Σ_t m_t logprobs_t, over Σ_t m_t if average; 0 for one without a counted token.

    Args:
        logprobs: (B, T), packed (total) with `cu_seqlens`, or (T) as one sequence; the gradient flows to it.
        mask: the same shape, bool or weights; None counts all.
        cu_seqlens: (B + 1), int32 or int64.
        backend: "cuda", "triton", "cpu" or "reference"; None chooses.

    Returns:
        (B), float32 (float64 for float64 logprobs), in nats.

    Raises:
        TypeError, ValueError: dtype, shape or device that do not fit, cu_seqlens that fall or do not end at the number of
        tokens.
    """
    cu = checks.token_matrix("logprobs", logprobs, cu_seqlens)
    if mask is not None:
        checks.like("mask", mask, "logprobs", logprobs, checks.MASKS)
    backend = choose("sequence_logprobs", logprobs, backend)
    if backend == "reference":
        value_checks.pack(cu, logprobs)
        row = logprobs.dim() == 1 and cu is None
        return reference.sequence_logprobs(
            logprobs.unsqueeze(0) if row else logprobs, mask.unsqueeze(0) if row and mask is not None else mask,
            cu_seqlens=cu, average=average,
        )  # fmt: skip
    out: Tensor = row_sums(logprobs, mask, average, cu, backend=backend)[0]
    return out.unsqueeze(0) if out.dim() == 0 else out
