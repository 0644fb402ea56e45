"""The tensors of a checkpoint written and read by all processes, each what it holds: torch.distributed.checkpoint with a
planner that asks each tensor where it lies. A checkpoint of one layout is read into any other.

Its format is torch's: the metadata beside the data is a pickle, so read only checkpoints that you trust.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load as read_shards
from torch.distributed.checkpoint.state_dict_saver import save as write_shards

from ..errors import CheckpointError, extra
from ..parallel.sharding import Chunk, Placement, placement_of
from .checkpoint import Files, checksum

SHARDS = "shards"
Tensors = Mapping[str, Mapping[str, Tensor]]


def _flat(tensors: Tensors) -> dict[str, Tensor]:
    """By group and name; numbers as one row, as `shards.scalar` has them."""
    flat = {f"{group}/{name}": tensor for group, named in tensors.items() for name, tensor in named.items()}
    return {name: tensor if tensor.dim() else tensor.view(1) for name, tensor in flat.items()}


def _where(tensor: Tensor) -> Placement:
    """Of one that says nothing: whole, and written by the first process."""
    shape = tuple(tensor.shape)
    leader = not dist.is_initialized() or dist.get_rank() == 0
    return placement_of(tensor) or Placement(shape, (Chunk((0,) * len(shape), (0,) * len(shape), shape),), leader)


def _box(chunk: Chunk) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))


class _SavePlanner(DefaultSavePlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, tensor in self.state_dict.items():
            where = _where(tensor)
            for chunk in where.chunks if where.writes else ():
                about = TensorWriteData(
                    chunk=_box(chunk), properties=TensorProperties(dtype=tensor.dtype), size=torch.Size(where.shape)
                )
                index = MetadataIndex(name, torch.Size(chunk.offsets))
                items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=about))
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        tensor = self.state_dict[index.fqn]
        chunk = next(c for c in _where(tensor).chunks if torch.Size(c.offsets) == index.offset)
        return chunk.of(tensor.detach())


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for name, tensor in self.state_dict.items():
            there = self.metadata.state_dict_metadata.get(name)
            where = _where(tensor)
            if there is None:
                raise CheckpointError(f"{name.partition('/')[0]}: {name.partition('/')[2]} is missing in the checkpoint")
            if tuple(there.size) != where.shape:  # type: ignore[union-attr]
                raise CheckpointError(
                    f"{name} has shape {tuple(there.size)} in the checkpoint, expected {where.shape}"  # type: ignore[union-attr]
                )
            items += create_read_items_for_chunk_list(name, there, [_box(c) for c in where.chunks])  # type: ignore[arg-type]
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        tensor = self.state_dict[read_item.dest_index.fqn]
        chunk = next(c for c in _where(tensor).chunks if torch.Size(c.offsets) == read_item.dest_index.offset)
        box = chunk.of(tensor.detach())
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            box = box.narrow(dim, start, length)
        return box


def save(directory: Path, tensors: Tensors) -> Files:
    """Collective over all processes. That all chunks together are each whole tensor, every element once, is checked.

    Returns:
        Size and checksum of each file of tensors; every process reads its own.

    Raises:
        CheckpointError: in every process, where one of them could not write; with the directory, that process and why.
    """
    alone = not dist.is_initialized()
    writer = FileSystemWriter(directory, single_file_per_rank=True)
    try:
        write_shards(dict(_flat(tensors)), storage_writer=writer, planner=_SavePlanner(), no_dist=alone)
    except CheckpointException as error:  # a BaseException, which nothing above expects
        rank, (first, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"{directory}: rank {rank}: {type(first).__name__}: {first}") from error
    return _read_back(directory)


def _read_back(directory: Path) -> Files:
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    own: dict[str, tuple[int, int]] | str
    try:
        own = {p.name: (p.stat().st_size, checksum(p)) for p in sorted(directory.glob(f"__{rank}_*"))}
    except OSError as error:
        own = f"{directory}: rank {rank}: {error}"
    found: list[Any] = [own]
    if world > 1:
        found = [None] * world
        dist.all_gather_object(found, own)
    if problems := [part for part in found if isinstance(part, str)]:
        raise CheckpointError(problems[0])
    return {name: known for part in found for name, known in part.items()}


def load(path: Path, tensors: Tensors) -> None:
    """Fill tensors in place from a checkpoint of any layout, one process's included. Collective over all processes.

    Raises:
        CheckpointError: a tensor that is missing or of another shape; the tensors may then be part old, part new.
    """
    with torch.no_grad():
        if not (path / SHARDS).is_dir():
            _from_one(path, tensors)
            return
        try:
            reader = FileSystemReader(path / SHARDS)
            read_shards(_flat(tensors), storage_reader=reader, planner=_LoadPlanner(), no_dist=not dist.is_initialized())
        except CheckpointException as error:
            first: Any = next(iter(error.failures.values()))[0]
            raise CheckpointError(f"{path}: {first}") from error


def _from_one(path: Path, tensors: Tensors) -> None:
    aliases = json.loads((path / "manifest.json").read_text())["aliases"]
    for group, named in tensors.items():
        file = path / f"{group}.safetensors"
        if not file.is_file():
            raise CheckpointError(f"{path}: {group} is missing in the checkpoint")
        with extra("safetensors").safe_open(file, framework="pt") as f:
            known = set(f.keys())
            for name, tensor in named.items():
                stored = aliases.get(group, {}).get(name, name)
                if stored not in known:
                    raise CheckpointError(f"{path}: {group}: {name} is missing in the checkpoint")
                _read(f, stored, f"{path}: {group}: {name}", tensor)


def _read(file: Any, stored: str, name: str, tensor: Tensor) -> None:
    """What of a stored tensor this process holds."""
    where, part = _where(tensor), file.get_slice(stored)
    shape = tuple(part.get_shape())
    if not shape and where.shape in ((), (1,)):
        tensor.detach().fill_(file.get_tensor(stored).item())
        return
    if shape != where.shape:
        raise CheckpointError(f"{name} has shape {shape} in the checkpoint, expected {where.shape}")
    for chunk in where.chunks:
        index = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
        chunk.of(tensor.detach()).copy_(part[index])
