"""Hugging Face directories written weight by weight, from however many processes a model is spread over."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import extra
from ..parallel import ParallelGroups, Stages
from ..parallel.collectives import led
from .config import DecoderConfig
from .decoder import Decoder

WEIGHTS, INDEX, HEAD = "model.safetensors", "model.safetensors.index.json", "score.weight"


class Entry(NamedTuple):
    """A weight of the directory and the pipeline stage that holds it."""

    name: str
    shape: tuple[int, ...]
    stage: int


def entries(config: DecoderConfig, stages: Stages, *, head: bool) -> Iterator[Entry]:
    """Every Hugging Face weight of a decoder in the order in which they are written. Takes no memory."""
    from .checkpoint import places

    whole = Decoder(replace(config, source={}), groups=ParallelGroups(), head=head, device="meta")
    holder = {layer: stage for stage in range(stages.count) for layer in stages.layers_of(stage)}
    for place in places(whole):
        parts = place.name.split(".")
        stage = holder[int(parts[2])] if parts[1] == "layers" else 0 if parts[1] == "embed_tokens" else stages.count - 1
        yield Entry(place.name, place.shape, stage % stages.pp)


def save_weights(
    model: Decoder, head: Mapping[str, Tensor], config: dict[str, Any], directory: str | Path, tokenizer: Any,
    dtype: torch.dtype | None, max_shard_bytes: int,
) -> None:  # fmt: skip
    """Collective over all processes; the first one writes, file by file, while the others wait as long as that takes."""
    groups, directory = model.groups, Path(directory)
    kind = dtype or model.dtype
    wanted = [Entry(name, tuple(t.shape), groups.pp.size - 1) for name, t in head.items()]
    wanted += entries(model.config, model.stages, head=model.has_head)
    dtypes = {e.name: torch.float32 if e.name == HEAD else kind for e in wanted}
    files = _files(wanted, dtypes, max_shard_bytes)
    weights = _arriving(model, head, wanted, dtypes)
    where: dict[str, str] = {}
    for number, members in enumerate(files):
        held = {entry.name: next(weights) for entry in members} if groups.dp.first else {}
        name = WEIGHTS if len(files) == 1 else f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        led(groups.world, partial(_write, held, directory / name))
        where |= dict.fromkeys((entry.name for entry in members), name)

    def describe() -> None:
        named = str(kind).removeprefix("torch.")
        (directory / "config.json").write_text(json.dumps(config | {"torch_dtype": named, "dtype": named}, indent=2) + "\n")
        if len(files) > 1:
            total = sum(torch.Size(e.shape).numel() * dtypes[e.name].itemsize for e in wanted)
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)

    led(groups.world, describe)


def _write(held: dict[str, Tensor], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    extra("safetensors.torch").save_file(held, file, metadata={"format": "pt"})
    held.clear()


def _files(wanted: list[Entry], dtypes: Mapping[str, torch.dtype], most: int) -> list[list[Entry]]:
    """What goes into which file, of at most so many bytes or one weight."""
    files: list[list[Entry]] = [[]]
    size = 0
    for entry in wanted:
        bytes_ = torch.Size(entry.shape).numel() * dtypes[entry.name].itemsize
        if size and size + bytes_ > most:
            files.append([])
            size = 0
        files[-1].append(entry)
        size += bytes_
    return files


def _arriving(
    model: Decoder, head: Mapping[str, Tensor], wanted: list[Entry], dtypes: Mapping[str, torch.dtype]
) -> Iterator[Tensor]:
    """The weights in order, on the first process's CPU; elsewhere what is there in their place."""
    from .checkpoint import named_weights

    pp, tp, own = model.groups.pp, model.groups.tp, named_weights(model)
    nothing = torch.empty(0)
    for entry in wanted:
        found = nothing
        if pp.rank == entry.stage:
            name, found = (entry.name, head[entry.name]) if entry.name in head else next(own)
            assert name == entry.name, (name, entry.name)
            found = found.detach().to(dtypes[entry.name]).contiguous()
            if not pp.first and tp.first:
                dist.send(found, dst=pp.ranks[0], group=pp.group)
        elif pp.first and tp.first:
            found = torch.empty(entry.shape, dtype=dtypes[entry.name], device=model.device)
            dist.recv(found, src=pp.ranks[entry.stage], group=pp.group)
        yield found.cpu() if model.groups.leader else nothing
