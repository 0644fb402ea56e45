"""The head's statistics in Triton: a tile of logits lives in registers and is folded into its rows' (max, sum, weighted sum,
label logit) before the next is multiplied. The vocabulary is cut in fixed parts, whose statistics `logprobs`' combine merges in
order; rows that do not count are compacted away on the device and cost a program that ends at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import launch
from ..common.tiles import tile
from ..common.triton_softmax import FLOOR, LN2, LOG2E
from ..logprobs.triton import soft_capped

TILES_OF_A_PART = 32  # columns of a part over columns of a tile: what a program folds in single precision


@triton.jit
def _tile(
    hidden, weight, bias, row, here, column, inside, width, hidden_stride, weight_stride, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Logits (BLOCK_M, BLOCK_N) before the soft cap: the same bits in the forward and in the backward. Operands of two kinds
    meet in float32."""
    x = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, width, BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        wide = at < width
        a = tl.load(hidden + row[:, None] * hidden_stride + at[None, :], mask=here[:, None] & wide[None, :], other=0.0)
        b = tl.load(
            weight + column[None, :].to(tl.int64) * weight_stride + at[:, None], mask=inside[None, :] & wide[:, None], other=0.0
        )
        if a.dtype != b.dtype:
            a, b = a.to(tl.float32), b.to(tl.float32)
        x = tl.dot(a, b, x, input_precision="ieee")
    if bias is not None:
        x += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit(do_not_specialize=["rows", "vocab", "blocks", "columns_of_part", "ignore_index", "vocab_start"])
def _partials(
    hidden, weight, bias, labels, temperatures, order, count, partials, rows, vocab, width, hidden_stride, weight_stride, scale,
    softcap, blocks, columns_of_part, vocab_start, CAPPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Part p of the columns for BLOCK_M rows; the programs of a part run side by side, so that its weights are read once."""
    block, part = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    counted = tl.load(count)
    if block * BLOCK_M >= counted:
        return
    at = block * BLOCK_M + tl.arange(0, BLOCK_M)
    here = at < counted
    row = tl.load(order + at, mask=here, other=0).to(tl.int64)
    label = tl.load(labels + row, mask=here, other=-1).to(tl.int64) - vocab_start
    if temperatures is not None:
        c = (1 / tl.load(temperatures + row, mask=here, other=1.0)).to(tl.float32) * LOG2E
    else:
        c = tl.zeros((BLOCK_M,), tl.float32) + scale * LOG2E
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    z = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    s = tl.zeros((BLOCK_M,), tl.float32)
    t = tl.zeros((BLOCK_M,), tl.float32)
    first = part * columns_of_part
    last = tl.minimum(first + columns_of_part, vocab)
    for left in range(first, last, BLOCK_N):
        column = left + tl.arange(0, BLOCK_N)
        inside = column < last
        x = _tile(
            hidden, weight, bias, row, here, column, inside, width, hidden_stride, weight_stride, BLOCK_M, BLOCK_N, BLOCK_K
        )
        x = tl.where(inside[None, :], soft_capped(x, softcap, CAPPED), float("-inf"))
        hit = (column[None, :] == label[:, None]) & inside[None, :]
        found = tl.sum(hit.to(tl.int32), 1) > 0
        z = tl.where(found, tl.sum(tl.where(hit, x, 0.0), 1), z)

        high = tl.maximum(m, tl.max(x, 1))
        reference = tl.where(high > float("-inf"), high, 0.0)
        u = (x - reference[:, None]) * c[:, None]
        e = tl.exp2(u)
        shift = (m - reference) * c
        factor = tl.exp2(shift)
        moved = tl.where(factor > 0, (t + s * tl.maximum(shift, FLOOR)) * factor, 0.0)
        t = moved + tl.sum(e * tl.maximum(u, FLOOR), 1)
        s = s * factor + tl.sum(e, 1)
        m = high
    to = partials + (part.to(tl.int64) * rows + row) * 4
    tl.store(to, m, mask=here)
    tl.store(to + 1, s, mask=here)
    tl.store(to + 2, t * LN2, mask=here)
    tl.store(to + 3, z, mask=here)


@triton.jit(do_not_specialize=["vocab", "blocks"])
def _logits(
    hidden, weight, bias, order, count, out, vocab, width, hidden_stride, weight_stride, out_stride, blocks,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    block, strip = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    counted = tl.load(count)
    if block * BLOCK_M >= counted:
        return
    at = block * BLOCK_M + tl.arange(0, BLOCK_M)
    here = at < counted
    row = tl.load(order + at, mask=here, other=0).to(tl.int64)
    column = strip * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < vocab
    x = _tile(hidden, weight, bias, row, here, column, inside, width, hidden_stride, weight_stride, BLOCK_M, BLOCK_N, BLOCK_K)
    tl.store(out + row[:, None] * out_stride + column[None, :], x, mask=here[:, None] & inside[None, :])


def tiles_of(hidden: Tensor, weight: Tensor) -> dict[str, int]:
    """By the width of an element: float32 operands take twice the room."""
    return tile("linear_logprobs.partials", hidden, 2 if hidden.dtype == weight.dtype != torch.float32 else 4)


def parts(hidden: Tensor, weight: Tensor) -> int:
    """Into how many parts the vocabulary is cut."""
    return triton.cdiv(weight.shape[0], tiles_of(hidden, weight)["BLOCK_N"] * TILES_OF_A_PART)


def _front(ignored: Tensor) -> tuple[Tensor, Tensor]:
    """The rows' order, those that count first, and how many do."""
    order = torch.argsort(ignored.to(torch.uint8), stable=True).int()
    return order, (ignored.shape[0] - ignored.sum()).int().reshape(1)


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, temperatures: Tensor | None, *, temperature: float,
    softcap: float, ignore_index: int, vocab_start: int, partials: Tensor,
) -> None:  # fmt: skip
    """partials (parts, rows, 4) of hidden (rows, H), weight (V, H), one label a row; those of ignored rows are not written."""
    rows, width = hidden.shape
    choice = tiles_of(hidden, weight)
    order, count = _front(labels == ignore_index)
    blocks = triton.cdiv(rows, choice["BLOCK_M"])
    launch(
        _partials, (blocks * partials.shape[0],), hidden, weight, bias, labels, temperatures, order, count, partials, rows,
        weight.shape[0], width, hidden.stride(0), weight.stride(0), 1 / temperature, softcap, blocks,
        choice["BLOCK_N"] * TILES_OF_A_PART, vocab_start, CAPPED=softcap != 0, **choice,
    )  # fmt: skip


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, ignored: Tensor) -> Tensor:
    """(rows, V) float32 before the soft cap, the forward's to the bit; those of ignored rows hold anything."""
    choice = tiles_of(hidden, weight)
    out = torch.empty((hidden.shape[0], weight.shape[0]), dtype=torch.float32, device=hidden.device)
    order, count = _front(ignored)
    blocks = triton.cdiv(hidden.shape[0], choice["BLOCK_M"])
    launch(
        _logits, (blocks * triton.cdiv(weight.shape[0], choice["BLOCK_N"]),), hidden, weight, bias, order, count, out,
        weight.shape[0], hidden.shape[1], hidden.stride(0), weight.stride(0), out.stride(0), blocks, **choice,
    )  # fmt: skip
    return out
