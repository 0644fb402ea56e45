"""A pack of sequences for one forward: where each begins, the positions, and attention within each.

Everything but attention sees the tokens of all sequences in one row, without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .rope import rotate

if TYPE_CHECKING:
    from .decoder import Attention


def offsets_of(lengths: Sequence[int]) -> Tensor:
    """Where each of them begins one after another, and the end: int64 (B + 1), on the CPU."""
    out = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    torch.cumsum(torch.tensor(lengths, dtype=torch.int64), 0, out=out[1:])
    return out


class Packed:
    """Sequences of the given lengths, one after another. `cu_seqlens` int64 (B + 1), `positions` int64 (total)."""

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths: expected one or more, each >= 1, got {list(lengths)[:8]}")
        self.lengths = list(lengths)
        self.longest = max(lengths)
        counts, cu = torch.tensor(self.lengths, dtype=torch.int64), offsets_of(self.lengths)
        total = int(cu[-1])
        starts = torch.repeat_interleave(cu[:-1], counts)
        self.cu_seqlens = cu.to(device)
        self.positions = (torch.arange(total) - starts).to(device)
        self.even = total == len(lengths) * self.longest
        if not self.even:
            slots = cu[:-1].unsqueeze(1) + torch.arange(self.longest)
            inside = torch.arange(self.longest) < counts.unsqueeze(1)
            self._from_pack = torch.where(inside, slots, total).reshape(-1).to(device)  # total: the row of zeros
            self._to_pack = inside.reshape(-1).nonzero().squeeze(1).to(device)
        self._turns: tuple[Tensor, Tensor] | None = None
        self._bands: dict[int, Tensor] = {}

    @staticmethod
    def of(sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Packed]:
        """The tokens (total), int64, and their pack."""
        flat = [t for s in sequences for t in s]
        return torch.tensor(flat, dtype=torch.int64, device=device), Packed([len(s) for s in sequences], device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Tensor:
        """Causal attention within each sequence: q (total, heads, D), k and v (total, kv heads, D) -> (total, heads · D).
        Rows past the total are padding and get zeros."""
        rows, total = q.shape[0], self.positions.shape[0]
        if rows > total:
            return F.pad(self.attend(q[:total], k[:total], v[:total], attention), (0, 0, 0, rows - total))
        if self._turns is None:
            cos, sin = attention.rotary.upto(self.longest, q.device)
            self._turns = (cos[self.positions], sin[self.positions])
        q, k = rotate(q, *self._turns), rotate(k, *self._turns)
        q, k, v = (self._pad(t) for t in (q, k, v))
        group = q.shape[1] // k.shape[1]
        if group > 1:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        # Padding follows what it pads: no real query sees it, so the causal rule alone will do.
        if attention.window is None or attention.window >= self.longest:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._band(attention.window, q.device))
        return self._unpad(out.transpose(1, 2))

    def _pad(self, x: Tensor) -> Tensor:
        if not self.even:
            x = _Reorder.apply(x, self._from_pack, self._to_pack)
        return x.reshape(len(self.lengths), self.longest, *x.shape[1:]).transpose(1, 2)

    def _unpad(self, x: Tensor) -> Tensor:
        x = x.reshape(len(self.lengths) * self.longest, -1)
        return x if self.even else _Reorder.apply(x, self._to_pack, self._from_pack)

    def _band(self, window: int, device: torch.device) -> Tensor:
        if window not in self._bands:
            at = torch.arange(self.longest, device=device)
            distance = at.unsqueeze(1) - at
            self._bands[window] = (distance >= 0) & (distance < window)
        return self._bands[window]


class _Reorder(torch.autograd.Function):
    """x's rows in another order; an index one past the end gives zeros. Its inverse is its gradient: no scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return _take(x, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        _, inverse = ctx.saved_tensors
        return _take(grads[0], inverse), None, None


def _take(x: Tensor, index: Tensor) -> Tensor:
    if index.shape[0] > x.shape[0]:  # padded: the row of zeros is needed
        x = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
    return x.index_select(0, index)
