"""Low-rank adapters: y + (alpha / rank) · (x Aᵀ) Bᵀ beside chosen projections (Hu et al. 2021).

With them the reference policy is the same weights with the adapters off: no second copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..parallel import ColumnParallelLinear, RowParallelLinear
from .decoder import Decoder

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Adapter(nn.Module):
    """The adapters of one layer: one for each adapted projection in it."""

    def __init__(self, layer: ColumnParallelLinear | RowParallelLinear, parts: Sequence[str], rank: int, alpha: float) -> None:
        super().__init__()
        self.scale, self.enabled = alpha / rank, True
        self.slices = {p: layer.rows(p) for p in parts} if isinstance(layer, ColumnParallelLinear) else {parts[0]: slice(None)}
        inputs, device = layer.weight.shape[1], layer.weight.device
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for part, rows in self.slices.items():
            width = layer.weight[rows].shape[0]
            self.a[part] = nn.Parameter(torch.empty(rank, inputs, device=device, dtype=torch.float32))
            self.b[part] = nn.Parameter(torch.zeros(width, rank, device=device, dtype=torch.float32))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.enabled:
            return y
        shares = []
        for part, rows in self.slices.items():
            low = F.linear(x, self.a[part].to(x.dtype))
            shares.append((rows, F.linear(low, self.b[part].to(x.dtype)) * self.scale))
        if len(shares) == 1 and shares[0][1].shape == y.shape:
            return y + shares[0][1]
        at, columns = 0, []
        for rows, share in shares:
            columns += [y[..., at : rows.start], y[..., rows] + share]
            at = rows.stop
        return torch.cat([*columns, y[..., at:]], -1)

    @torch.no_grad()
    def merge(self, weight: Tensor) -> Tensor:
        """The weight with the adapters in it; the layer's own is left as it is."""
        merged = weight.float().clone()
        for part, rows in self.slices.items():
            merged[rows] += self.scale * (self.b[part] @ self.a[part])
        return merged.to(weight.dtype)


def add_lora(
    model: Decoder, *, rank: int, alpha: float | None = None, targets: Sequence[str] = PROJECTIONS, seed: int = 0
) -> list[nn.Parameter]:
    """Put adapters beside the target projections and freeze everything else. B starts at 0: nothing changes at first.

    Args:
        alpha: the scale is alpha / rank; None is 2 · rank.
        targets: of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj.

    Returns:
        The adapters' parameters.

    Raises:
        ValueError: rank < 1, a target that there is not, or a decoder that is sharded (tp > 1).
    """
    if model.groups.tp.size > 1:
        raise ValueError(f"model.lora.rank: not yet with tensor parallelism, expected 0 with tp={model.groups.tp.size}")
    if rank < 1:
        raise ValueError(f"lora rank: expected >= 1, got {rank}")
    if unknown := set(targets) - set(PROJECTIONS):
        raise ValueError(f"lora targets: expected some of {PROJECTIONS}, got {sorted(unknown)}")
    for p in model.parameters():
        p.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    parameters: list[nn.Parameter] = []
    for name, layer in list(model.linears()):
        inside = list(layer.parts) if isinstance(layer, ColumnParallelLinear) else [name.rsplit(".", 1)[-1]]
        parts = [p for p in inside if p in targets]
        if not parts:
            continue
        adapter = Adapter(layer, parts, rank, 2.0 * rank if alpha is None else alpha)
        with torch.no_grad():
            for a in adapter.a.values():
                bound = 1 / math.sqrt(a.shape[1])
                a.copy_(torch.rand(a.shape, generator=generator) * (2 * bound) - bound)
        layer.adapter = adapter
        parameters += adapter.parameters()
    return parameters


def adapters(model: nn.Module) -> Iterator[Adapter]:
    for module in model.modules():
        if isinstance(module, Adapter):
            yield module


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before `add_lora`, to the bit."""
    held = [(a, a.enabled) for a in adapters(model)]
    for adapter, _ in held:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter, enabled in held:
            adapter.enabled = enabled
