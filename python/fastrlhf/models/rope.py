"""Rotary positions, with the scalings that the Llama family uses.

A pair (x_i, x_{i+D/2}) of a head is turned by position · ω_i, ω_i = θ^(-2i/D), changed by the scaling. Sources: Su et al.
2021; linear Chen et al. 2023; yarn Peng et al. 2023; llama3 Meta 2024.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def frequencies(rope: Mapping[str, Any], head_dim: int) -> tuple[Tensor, float]:
    """ω (head_dim / 2), float32, and the factor on cosine and sine."""
    kind, theta = rope["rope_type"], rope["rope_theta"]
    omega = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if kind == "default":
        return omega, 1.0
    factor = rope["factor"]
    if kind == "linear":
        return omega / factor, 1.0
    if kind == "llama3":
        return _llama3(omega, rope), 1.0
    return _yarn(omega, rope, head_dim)


def _llama3(omega: Tensor, rope: Mapping[str, Any]) -> Tensor:
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * omega / (2 * math.pi)  # over the context it was trained with
    smooth = (turns - low) / (high - low)
    between = (1 - smooth) * omega / factor + smooth * omega
    return torch.where(turns < low, omega / factor, torch.where(turns > high, omega, between))


def _yarn(omega: Tensor, rope: Mapping[str, Any], head_dim: int) -> tuple[Tensor, float]:
    context = rope["original_max_position_embeddings"]
    factor, theta = rope["factor"], rope["rope_theta"]

    def dimension(turns: float) -> float:
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)
    scale = rope.get("attention_factor")
    if scale is None:
        mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        scale = _mscale(factor, mscale) / _mscale(factor, all_dim) if mscale and all_dim else _mscale(factor, 1.0)
    return omega / factor * (1 - keep) + omega * keep, float(scale)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


class RotaryTable:
    """Cosines and sines of the positions met so far, kept by device and grown when a later one comes."""

    def __init__(self, rope: Mapping[str, Any], head_dim: int) -> None:
        self.omega, self.factor = frequencies(rope, head_dim)
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def upto(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(cos, sin), float32 (at least length, head_dim / 2)."""
        held = self._tables.get(device)
        if held is None or held[0].shape[0] < length:
            size = max(256, 1 << (length - 1).bit_length())
            angles = torch.arange(size, dtype=torch.float32).unsqueeze(1) * self.omega
            held = ((angles.cos() * self.factor).to(device), (angles.sin() * self.factor).to(device))
            self._tables[device] = held
        return held


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (tokens, heads, D) turned by (tokens, D / 2); in float32, given back in x's dtype."""
    a, b = x.float().chunk(2, -1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
