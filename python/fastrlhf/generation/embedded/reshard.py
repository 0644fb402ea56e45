"""A pipeline's policy as one decoder for generation: every process gets the layers of the other stages for as long as it
generates, and pp · dp replicas draw completions instead of dp."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ...models.decoder import Attention, Decoder
from ...parallel.groups import Axis


class _Held(NamedTuple):
    """A parameter of the whole decoder and the pipeline rank whose it is."""

    module: nn.Module
    name: str
    rank: int
    own: bool


class Resharded:
    """`decoder`: all layers, cut by tp only. It shares this process's own stages with `model`; the others' weights take
    memory within `gathered` only. Without a pipeline, or where that is not wanted, it is the model itself.

    Args:
        wanted: False leaves the layers where they are: generation then goes through the stages.
    """

    def __init__(self, model: Decoder, wanted: bool = True) -> None:
        self.model, self.decoder = model, model
        self._held: list[_Held] = []
        pp = model.groups.pp
        if pp.size == 1 or not wanted:
            return
        groups = replace(model.groups, pp=Axis())
        self.decoder = whole = Decoder(model.config, groups=groups, head=model.has_head, device="meta", dtype=model.dtype)
        whole.rotary, whole.sequence = model.rotary, model.sequence
        for name, stage in self._units():
            rank = stage % pp.size
            parent, _, leaf = name.rpartition(".")
            if rank == pp.rank:
                whole.get_submodule(parent)._modules[leaf] = model.get_submodule(name)
            else:
                for module in whole.get_submodule(name).modules():
                    if isinstance(module, Attention):
                        module.rotary = model.rotary
            for module in whole.get_submodule(name).modules():
                self._held += [_Held(module, n, rank, rank == pp.rank) for n, _ in module.named_parameters(recurse=False)]

    def _units(self) -> Iterator[tuple[str, int]]:
        """What a stage holds as a whole, and the stage."""
        stages = self.model.stages
        yield "embed_tokens", 0
        for stage in range(stages.count):
            for i in stages.layers_of(stage):
                yield f"layers.{i}", stage
        yield "norm", stages.count - 1
        if self.decoder.lm_head is not None:
            yield "lm_head", stages.count - 1

    @property
    def replicas(self) -> Axis:
        """The processes that draw different completions, each for its tp rank (and stage)."""
        return self.model.groups.dp if self.decoder is self.model else self.model.groups.replicas

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within: `decoder` has all weights. Collective over the pipeline."""
        if self.decoder is self.model:
            yield
            return
        self._gather()
        try:
            yield
        finally:
            for held in self._held:
                if not held.own:
                    parameter = getattr(held.module, held.name)
                    held.module._parameters[held.name] = nn.Parameter(parameter.data.to("meta"), requires_grad=False)

    @torch.no_grad()
    def _gather(self) -> None:
        pp, device = self.model.groups.pp, self.model.device
        under_way = []
        for held in self._held:
            if not held.own:
                empty = torch.empty_like(getattr(held.module, held.name), device=device)
                held.module._parameters[held.name] = nn.Parameter(empty, requires_grad=False)
            weight = getattr(held.module, held.name).data
            under_way.append(dist.broadcast(weight, src=pp.ranks[held.rank], group=pp.group, async_op=True))
        for work in under_way:
            assert work is not None
            work.wait()
