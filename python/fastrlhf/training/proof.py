"""That the shards of a layout are exactly the model: every process's part on the meta device, every element counted."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import torch

from ..models import Decoder, DecoderConfig
from ..models.checkpoint import places
from ..models.export import entries
from ..parallel import ParallelGroups, Stages
from ..parallel.groups import Axis
from .optim import trainable
from .shards import Slice

Box = tuple[tuple[int, int], ...]
"""[start, end) in each dimension."""


def covers_once(shape: tuple[int, ...], boxes: Iterable[Box]) -> bool:
    """Whether boxes hold every element of a shape exactly once: their volumes add up to it and no two overlap."""
    found = sorted(boxes)
    if sum(prod(high - low for low, high in box) for box in found) != prod(shape):
        return False
    if any(low < 0 or high > size for box in found for (low, high), size in zip(box, shape, strict=True)):
        return False
    for i, box in enumerate(found):
        for other in found[i + 1 :]:
            if other and other[0][0] >= box[0][1]:
                break  # sorted by where they begin
            if all(a[0] < b[1] and b[0] < a[1] for a, b in zip(box, other, strict=True)):
                return False
    return True


def part(config: DecoderConfig, stages: Stages, sizes: tuple[int, int, int], ranks: tuple[int, int, int]) -> Decoder:
    """One process's part of a model, without memory. Sizes and ranks of (tp, pp, dp)."""
    tp, pp, dp = (Axis(None, r, n, tuple(range(n))) for r, n in zip(ranks, sizes, strict=True))
    world = Axis(None, (ranks[1] * dp.size + ranks[2]) * tp.size + ranks[0], tp.size * pp.size * dp.size)
    groups = ParallelGroups(tp=tp, pp=pp, dp=dp, world=world)
    return Decoder(config, groups=groups, device="meta", dtype=torch.bfloat16, stages=stages, sequence_parallel=True)


def proof(config: DecoderConfig, tp: int, pp: int, dp: int, *, interleave: int = 1) -> str:
    """Instantiates every process's part on the meta device, and checks that the Hugging Face weights together, and the rows
    that the dp ranks step together, are the whole model with every element once.

    Returns:
        A line that says what was counted.

    Raises:
        ValueError: a size that does not fit; AssertionError: an element that is missing or held twice, by name.
    """
    stages = Stages(config.num_hidden_layers, pp, interleave if pp > 1 else 1)
    expected = {e.name: e.shape for e in entries(config, stages, head=True)}
    held: dict[str, list[Box]] = {name: [] for name in expected}
    stepped: dict[str, tuple[tuple[int, ...], list[Box]]] = {}
    most = 0
    for p in range(pp):
        for t in range(tp):
            model = part(config, stages, (tp, pp, dp), (t, p, 0))
            most = max(most, sum(w.numel() for w in model.parameters()))
            for place in places(model):
                assert place.shape == expected[place.name], (place.name, place.shape, expected[place.name])
                if place.dim is None and t:
                    continue  # whole on every tp rank; the first counts
                sizes = place.parameter.shape
                held[place.name].append(
                    tuple((t * n if d == place.dim else 0, (t * n if d == place.dim else 0) + n) for d, n in enumerate(sizes))
                )
            for rank in range(dp):
                groups = part_groups(model.groups, rank)
                for name, parameter in trainable(model).items():
                    slice_ = Slice(parameter, groups)
                    where = slice_.placement()
                    boxes = stepped.setdefault(name, (where.shape, []))[1]
                    if slice_.counts:
                        boxes += [tuple((o, o + n) for o, n in zip(c.offsets, c.sizes, strict=True)) for c in where.chunks]
    for name, shape in expected.items():
        assert covers_once(shape, held[name]), f"{name}: not every element of {shape} is held once"
    for name, (shape, boxes) in stepped.items():
        assert covers_once(shape, boxes), f"{name}: not every element of {shape} is stepped once"
    total = sum(prod(shape) for shape in expected.values())
    assert total == sum(prod(shape) for shape, _ in stepped.values())
    return (
        f"tp {tp} x pp {pp} x dp {dp}: {len(expected)} weights, {total:,} elements, each held once over tp and pp and stepped "
        f"once over dp; the fullest process holds {most:,}"
    )


def part_groups(groups: ParallelGroups, dp_rank: int) -> ParallelGroups:
    """The same place in another replica."""
    from dataclasses import replace

    return replace(groups, dp=replace(groups.dp, rank=dp_rank))
