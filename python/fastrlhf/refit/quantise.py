"""float8 at the source: half the bytes on the wire, the scales as tensors of their own in the plan.

The default is not this: bfloat16 goes over and the engine's own hook quantises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 448.0  # of float8_e4m3fn


class Quantised(NamedTuple):
    """`data` float8_e4m3fn of the weight's shape; `scale_inv` float32, one a block: data · scale_inv ≈ weight."""

    data: Tensor
    scale_inv: Tensor


@torch.no_grad()
def quantise_blocks(weight: Tensor, block: tuple[int, int] = (128, 128)) -> Quantised:
    """scale_inv = max|w| / 448 over each block (1 where a block is all zeros), data = round(w / scale_inv).

    Blocks are counted from the weight's own first row and column: a shard quantised by itself gives the bytes of the whole only
    if its edges are edges of blocks. The planner refuses shards of which that is not so.

    Args:
        weight: (rows, cols), any float dtype.

    Returns:
        data (rows, cols), scale_inv (⌈rows / block⌉, ⌈cols / block⌉).
    """
    if weight.dim() != 2:
        raise ValueError(f"weight: expected a matrix, got shape {tuple(weight.shape)}")
    high, wide = block
    rows, cols = weight.shape
    x = F.pad(weight.float(), (0, -cols % wide, 0, -rows % high))
    tiles = x.view(x.shape[0] // high, high, x.shape[1] // wide, wide)
    scale = tiles.abs().amax((1, 3)) / LARGEST
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    data = (tiles / scale[:, None, :, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return Quantised(data.view(x.shape)[:rows, :cols].contiguous(), scale)


@torch.no_grad()
def quantise_fused(parts: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Projections that an engine fuses under one scale a tensor, as [Q | K | V]: the scale is of the largest of all of them.

    Returns:
        the parts in float8_e4m3fn, and scale_inv, float32 ().
    """
    if not parts:
        raise ValueError("parts: expected one or more, got none")
    largest = torch.stack([p.abs().amax().float() for p in parts]).amax()
    scale = torch.where(largest == 0, torch.ones_like(largest), largest / LARGEST)
    return [(p.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn) for p in parts], scale
