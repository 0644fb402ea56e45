"""Rows of a head's call, as many as fit the workspace, multiplied out once: their results, and their logits for what comes
next."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.linear_logprobs import chunked
from ..kernels.linear_logprobs.chunked import Tile
from . import hopper_head
from .backend import address, empty, extension, result_dtype, threads
from .distributed import all_gather
from .linear_logprobs import HeadCall, Results, merge_parts
from .logprobs import combine, fold

# As the backend keeps them; None: it does not.
Logits = Tensor | hopper_head.Exponentials | None


def blocks(call: HeadCall, backend: str, world: int) -> list[Any]:
    """Rows whose logits fit the workspace together, the same on all ranks: those of unequal shards fit on the average. Where
    looking costs nothing, only those that count."""
    columns, itemsize = -(-call.vocab_total // world), result_dtype(call.hidden).itemsize
    if backend == "cpu":
        columns += 5 * call.hidden.shape[-1] + 1920  # rows and their gradients, plain and packed; two strips of d logits
    elif backend == "cuda" and call.rounded and hopper_head.serves(call):
        itemsize = 2
    height = max(1, call.workspace_bytes // (columns * itemsize))
    if backend == "cpu":
        height = max(32, height // 32 * 32)
        rows = (call.labels.reshape(-1) != call.ignore_index).nonzero().squeeze(1)
        return list(rows.split(height)) if rows.shape[0] else []
    return [slice(top, min(top + height, call.rows)) for top in range(0, call.rows, height)]


def of_rows(call: HeadCall, rows: Any) -> HeadCall:
    indptr, indices = call.kept_indptr, call.kept_indices
    if indptr is not None and indices is not None:
        if isinstance(rows, slice):
            indptr = indptr[rows.start : rows.stop + 1]
        else:
            sizes = indptr.diff()
            of = torch.repeat_interleave(torch.arange(call.rows), sizes)
            chosen = torch.zeros(call.rows, dtype=torch.bool)
            chosen[rows] = True
            indices = indices[chosen[of]]
            indptr = torch.cat([indptr.new_zeros(1), sizes[rows].cumsum(0)])
    mask = None if call.kept_mask is None else call.kept_mask.view(call.rows, -1)[rows].contiguous()
    temperatures = None if call.temperatures is None else call.temperatures[rows].contiguous()
    return call._replace(
        hidden=call.flat[rows], labels=call.labels.reshape(-1)[rows].contiguous(), temperatures=temperatures, kept_mask=mask,
        kept_indptr=indptr, kept_indices=indices,
    )  # fmt: skip


def multiply_out(call: HeadCall, group: Any, backend: str) -> tuple[Results, Logits]:
    """The rows' results, and their logits as the backend keeps them; a sparse head keeps none."""
    dtype = result_dtype(call.hidden)
    out = Results(*(empty((call.rows,), dtype, call.hidden) for _ in range(5)))
    parts: Tensor | None = None
    logits: Logits = None
    if backend == "cpu":
        module, room = extension(), None
        if call.kept_indptr is None:
            room = empty((module.linear_logprobs_stored_size(call.rows, call.weight.shape[0]),), dtype, call.hidden)
        logits = room
        if group is not None:
            parts = empty((1, call.rows, 4), dtype, call.hidden)
        module.linear_logprobs_forward(
            *call.native(), (0, 0, 0, 0, 0) if group is not None else tuple(address(t) for t in out), address(parts),
            address(room), call.workspace_bytes, threads(),
        )  # fmt: skip
    elif backend == "cuda" and call.rounded and hopper_head.serves(call):
        logits = hopper_head.Exponentials(call)
        parts = logits.partials if group is None else merge_parts(logits.partials, call)
    else:
        tile = Tile(slice(0, call.rows), slice(0, call.weight.shape[0]))
        logits = chunked.logits(call.clean, call.weight, call.bias, tile)
        parts = empty((1, call.rows, 4), dtype, call.hidden)
        fold(call.of(logits, tile), parts[0], backend)
    if parts is not None:
        combine(call.whole(), parts if group is None else all_gather(parts[0], group), out, backend)
    return out, logits


def in_rows(logits: Tensor, rows: int, vocab: int) -> Tensor:
    """(rows, V), soft-capped, of what the CPU kept: panels of rows, column by column."""
    lanes = extension().linear_logprobs_stored_lanes(logits.dtype == torch.float64)
    panels = logits[: -(-rows // lanes) * lanes * vocab].view(-1, vocab, lanes)
    return panels.transpose(1, 2).reshape(-1, vocab)[:rows].contiguous()
