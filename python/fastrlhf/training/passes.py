"""Micro-batches through a decoder, forward, or forward and backward; over the stages of a pipeline where there is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..models import Decoder, Packed
from ..parallel import ParallelGroups, pipeline


def run(model: Decoder, inputs: Sequence[tuple[Tensor, Packed]], last: Callable[[int, Tensor], Tensor | None]) -> None:
    """Every micro-batch, (tokens, pack), through the model; backward too where gradients are enabled.

    Args:
        last: (which micro-batch, hidden (total, H)) -> its loss. Called in the last stage of the pipeline only: what it
            finds out must be brought to the others.
    """
    backward = torch.is_grad_enabled()
    if model.groups.pp.size == 1:
        for i, (tokens, pack) in enumerate(inputs):
            loss = last(i, model(tokens, pack))
            if backward and loss is not None:
                loss.backward()
        return
    width, dtype, device = model.config.hidden_size, model.dtype, model.device

    def empty(i: int) -> Tensor:
        return torch.empty(model.rows(inputs[i][0].shape[0]), width, dtype=dtype, device=device)

    def forward(chunk: int, i: int, rows: Tensor | None) -> Tensor:
        tokens, pack = inputs[i]
        return model.stage(chunk, tokens if rows is None else rows, pack)

    pipeline.run(model.groups, model.stages.interleave, len(inputs), empty=empty, forward=forward, last=last, backward=backward)


def assembled(out: Tensor, groups: ParallelGroups) -> Tensor:
    """The whole of what each process filled its rows of, in place; the others' must be 0. In a pipeline only the last
    stage's rows count."""
    if groups.replicas.size > 1:
        if not groups.pp.last:
            out.zero_()
        torch.distributed.all_reduce(out, group=groups.replicas.group)
    return out
