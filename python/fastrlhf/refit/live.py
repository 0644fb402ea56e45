"""The catalogue of a live decoder of ours: which rows and columns of which Hugging Face tensors its parameters hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..models import Decoder
from ..models.decoder import RMSNorm
from ..models.lora import Adapter
from ..parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from .catalogue import Builder, Catalogue


class Held(NamedTuple):
    """A parameter (rows, cols) and the parts of it: (Hugging Face name, its rows and cols, where the part begins there, rows of
    the part, where it lies in the parameter)."""

    name: str
    tensor: Tensor
    rows: int
    cols: int
    parts: list[tuple[str, int, int, int, int, int, int]]


def catalogue_of(model: Decoder, rank: int = 0, ranks: int = 1) -> Catalogue:
    """What `model`, which is rank `rank` of `ranks` that hold the same model together, has of each tensor."""
    builder = Builder(ranks)
    for held in _held(model):
        dtype = str(held.tensor.dtype).removeprefix("torch.")
        param = builder.param(rank, held.name, held.rows, held.cols, dtype)
        for name, rows, cols, row, col, height, at in held.parts:
            builder.put(builder.tensor(name, rows, cols, dtype), row, col, height, held.cols, param, at)
    return builder.build()


def parameters_of(model: Decoder) -> dict[str, Tensor]:
    """The tensors of `catalogue_of`'s params. Of a layer with adapters it is the layer's own weight: see `Merged`."""
    return {held.name: held.tensor for held in _held(model)}


def _held(model: Decoder) -> Iterator[Held]:
    for prefix, module in model.named_modules():
        base = "model." + prefix
        if isinstance(module, ColumnParallelLinear):
            yield from _columns(prefix, base, module)
        elif isinstance(module, RowParallelLinear):
            rows, cols = module.weight.shape
            name = base + ".weight"
            yield Held(prefix + ".weight", module.weight, rows, cols,
                       [(name, rows, cols * module.axis.size, 0, module.axis.rank * cols, rows, 0)])  # fmt: skip
            if module.bias is not None:
                yield Held(prefix + ".bias", module.bias, rows, 1, [(base + ".bias", rows, 1, 0, 0, rows, 0)])
        elif isinstance(module, VocabParallelEmbedding):
            name = "lm_head.weight" if prefix == "lm_head" else base + ".weight"
            rows, cols = module.weight.shape
            yield Held(prefix + ".weight", module.weight, rows, cols,
                       [(name, rows * module.axis.size, cols, module.first, 0, rows, 0)])  # fmt: skip
        elif isinstance(module, RMSNorm):
            size = module.weight.numel()
            yield Held(prefix + ".weight", module.weight, size, 1, [(base + ".weight", size, 1, 0, 0, size, 0)])


def _columns(prefix: str, base: str, module: ColumnParallelLinear) -> Iterator[Held]:
    parent, axis = base.rsplit(".", 1)[0], module.axis
    for kind, tensor in (("weight", module.weight), ("bias", module.bias)):
        if tensor is None:
            continue
        cols = tensor.shape[1] if kind == "weight" else 1
        parts = []
        for part, width in module.parts.items():
            parts.append(
                (f"{parent}.{part}.{kind}", width * axis.size, cols, axis.rank * width, 0, width, module.rows(part).start)
            )
        yield Held(f"{prefix}.{kind}", tensor, tensor.shape[0], cols, parts)


class Merged:
    """The weights of a decoder with adapters merged in: a copy of each adapted layer's weight, made once and filled again
    before every refit. Without adapters there is nothing here and the parameters themselves are the source."""

    def __init__(self, model: Decoder) -> None:
        self._layers: list[tuple[ColumnParallelLinear | RowParallelLinear, Tensor]] = []
        self.tensors = parameters_of(model)
        for name, layer in model.linears():
            if isinstance(layer.adapter, Adapter):
                copy = torch.empty_like(layer.weight, requires_grad=False)
                self._layers.append((layer, copy))
                self.tensors[name + ".weight"] = copy

    @property
    def nbytes(self) -> int:
        return sum(copy.nbytes for _, copy in self._layers)

    @torch.no_grad()
    def refresh(self) -> None:
        for layer, copy in self._layers:
            assert isinstance(layer.adapter, Adapter)
            copy.copy_(layer.adapter.merge(layer.weight.detach()))
