"""`sample` in Triton, a row a program. Without a cut: one read, which keeps every tile's weight, then the tile that holds
the token. With cuts: thresholds by radix descent, two bits of the key a pass, neither sort nor histogram; where a few
thousand of the highest logits are sure to hold all that is kept, they are set aside first and the row is not read again."""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import launch
from ..common.triton_rows import load_tile, row_start, row_tile, rows_of, tile_columns
from ..common.triton_softmax import LOG2E, anchor

_LOW_BITS = {torch.float32: 0, torch.float16: 12, torch.bfloat16: 16}  # of a float32 that came from this dtype: an even number
_RUNTIME = ["inner", "temperature", "top_k", "top_p", "min_p", "seed"]


@triton.jit
def _setting(per_row, row, bits):
    """A row's setting as float64, or the scalar whose bits came: Triton passes a Python float as float32."""
    if per_row is None:
        return tl.full((), bits, tl.int64).to(tl.float64, bitcast=True)
    else:
        return tl.load(per_row + row)


@triton.jit
def _uniform(seed, counter):
    """In [0, 1) with 53 bits: Philox 4x32-10 of (seed, counter)."""
    zero = tl.full((), 0, tl.uint32)
    high, low, _, _ = tl.philox(seed, counter.to(tl.uint32), zero, zero, zero)
    bits = ((high.to(tl.uint64) << 32) | low.to(tl.uint64)) >> 11
    return bits.to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _key(x):
    """Unsigned, in the order of the floats."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _value(key, LOW_BITS: tl.constexpr):
    """The float of a key whose low bits, which no key of this dtype has of its own, are not set; -inf for keys below."""
    low = tl.full((), (1 << LOW_BITS) - 1, tl.uint32)
    bits = tl.where(key >= 0x80000000, key & 0x7FFFFFFF, (key | low) ^ 0xFFFFFFFF)
    return tl.where(key <= 0x007FFFFF, float("-inf"), bits.to(tl.float32, bitcast=True))


@triton.jit
def _all(x):
    return tl.sum(tl.sum(tl.sum(x, 2), 1), 0)


@triton.jit
def _any_tile(row, begin, columns, n, BLOCK: tl.constexpr):
    """A tile, -inf past the row's end."""
    if begin + BLOCK <= n:
        x = load_tile(row, begin + columns, n, False)
    else:
        x = load_tile(row, begin + columns, n, True)
    return x


@triton.jit
def _statistics(row, n, c, TILES: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """The maximum, the first tile that holds it, and every tile's Σ 2^((x - max) c) as float64."""
    columns = tile_columns(BLOCK, LANES, VECTOR)
    numbers = tl.arange(0, TILES)
    sums = tl.zeros((TILES,), tl.float32)
    references = tl.full((TILES,), float("-inf"), tl.float32)
    m = tl.full((), float("-inf"), tl.float32)
    best = tl.full((), 0, tl.int32)
    for i in range(tl.cdiv(n, BLOCK)):
        x = _any_tile(row, i * BLOCK, columns, n, BLOCK)
        high = tl.max(tl.max(tl.max(x, 2), 1), 0)
        best = tl.where(high > m, i, best)
        m = tl.maximum(m, high)
        base = anchor(m)
        sums = tl.where(numbers == i, _all(tl.exp2((x - base) * c)), sums)
        references = tl.where(numbers == i, base, references)
    return m, best, (sums * tl.exp2((references - anchor(m)) * c)).to(tl.float64)


@triton.jit
def _kept(x, threshold):
    return (x >= threshold) & (x > float("-inf"))


@triton.jit
def _weigh(row, n, threshold, m, c, TILES: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Every tile's Σ 2^((x - m) c) over the elements at or above the threshold, and how many there are."""
    columns = tile_columns(BLOCK, LANES, VECTOR)
    numbers = tl.arange(0, TILES)
    sums = tl.zeros((TILES,), tl.float64)
    counts = tl.zeros((LANES,), tl.int32)
    for i in range(tl.cdiv(n, BLOCK)):
        x = _any_tile(row, i * BLOCK, columns, n, BLOCK)
        kept = _kept(x, threshold)
        sums = tl.where(numbers == i, _all(tl.where(kept, tl.exp2((x - m) * c), 0.0)).to(tl.float64), sums)
        counts += tl.sum(tl.sum(kept.to(tl.int32), 2), 1)
    return sums, tl.sum(counts, 0)


@triton.jit
def _search(
    row, n, target, m, c, MASS: tl.constexpr, LOW_BITS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """The highest threshold at or above which the elements count (or, by MASS, weigh) `target` or more."""
    columns = tile_columns(BLOCK, LANES, VECTOR)
    prefix = tl.full((), 0, tl.uint32)
    digit = tl.full((), 1 << 30, tl.uint32)
    for _ in range(16 - LOW_BITS // 2):
        first = prefix + digit
        second = first + digit
        third = second + digit
        reached1 = tl.zeros((LANES,), tl.float32)
        reached2 = tl.zeros((LANES,), tl.float32)
        reached3 = tl.zeros((LANES,), tl.float32)
        for begin in range(0, n, BLOCK):
            x = _any_tile(row, begin, columns, n, BLOCK)
            key = _key(x)
            weight = x * 0 + 1
            if MASS:
                weight = tl.exp2((x - m) * c)
            reached1 += tl.sum(tl.sum(tl.where(key >= first, weight, 0.0), 2), 1)
            reached2 += tl.sum(tl.sum(tl.where(key >= second, weight, 0.0), 2), 1)
            reached3 += tl.sum(tl.sum(tl.where(key >= third, weight, 0.0), 2), 1)
        prefix += tl.where(tl.sum(reached1.to(tl.float64), 0) >= target, digit, 0)
        prefix += tl.where(tl.sum(reached2.to(tl.float64), 0) >= target, digit, 0)
        prefix += tl.where(tl.sum(reached3.to(tl.float64), 0) >= target, digit, 0)
        digit = digit >> 2
    return _value(prefix, LOW_BITS)


@triton.jit
def _reach(e, u, depth):
    """How many elements lie within `depth` (a power of two, in logarithms) of the maximum, and their weight."""
    near = u >= -depth
    return tl.sum(tl.sum(near.to(tl.int32), 2), 1), tl.sum(tl.sum(tl.where(near, e, 0.0), 2), 1)


@triton.jit
def _depth(row, n, top_k, mass, m, c, BLOCK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """The least of a few depths below the maximum that holds top_k elements (if > 0, else that weighs `mass`), and how many
    it holds; n of them where none does."""
    columns = tile_columns(BLOCK, LANES, VECTOR)
    none = tl.zeros((LANES,), tl.int32)
    n1, n2, n3, n4, n5 = none, none, none, none, none
    nothing = tl.zeros((LANES,), tl.float32)
    w1, w2, w3, w4, w5 = nothing, nothing, nothing, nothing, nothing
    for begin in range(0, n, BLOCK):
        u = (_any_tile(row, begin, columns, n, BLOCK) - m) * c
        e = tl.exp2(u)
        more, weight = _reach(e, u, 3.0)
        n1, w1 = n1 + more, w1 + weight
        more, weight = _reach(e, u, 6.0)
        n2, w2 = n2 + more, w2 + weight
        more, weight = _reach(e, u, 12.0)
        n3, w3 = n3 + more, w3 + weight
        more, weight = _reach(e, u, 24.0)
        n4, w4 = n4 + more, w4 + weight
        more, weight = _reach(e, u, 64.0)
        n5, w5 = n5 + more, w5 + weight
    depth = 0.0
    count = n
    depth, count = _if_enough(depth, count, 64.0, n5, w5, top_k, mass)
    depth, count = _if_enough(depth, count, 24.0, n4, w4, top_k, mass)
    depth, count = _if_enough(depth, count, 12.0, n3, w3, top_k, mass)
    depth, count = _if_enough(depth, count, 6.0, n2, w2, top_k, mass)
    return _if_enough(depth, count, 3.0, n1, w1, top_k, mass)


@triton.jit
def _if_enough(depth, count, other_depth, n, w, top_k, mass):
    held = tl.sum(n, 0)
    enough = tl.where(top_k > 0, held >= top_k, tl.sum(w.to(tl.float64), 0) >= mass)
    return tl.where(enough, other_depth, depth), tl.where(enough, held, count)


@triton.jit
def _set_aside(row, n, depth, m, c, values, columns, STEP: tl.constexpr):
    """The elements within `depth` of the maximum, in order, and where they were."""
    for begin in range(0, n, STEP):
        at = begin + tl.arange(0, STEP)
        x = load_tile(row, at, n, True)
        near = ((x - m) * c >= -depth) & (at < n)
        count = tl.sum(near.to(tl.int32), 0)
        if count > 0:
            place = tl.cumsum(near.to(tl.int32), 0) - 1
            tl.store(values + place, x.to(values.dtype.element_ty), mask=near)
            tl.store(columns + place, at, mask=near)
            values += count
            columns += count


@triton.jit
def _passing_tile(sums, goal, TILES: tl.constexpr):
    """The first tile whose cumulative weight passes `goal`, else the last of any weight, and the weight before it."""
    numbers = tl.arange(0, TILES)
    passed = tl.cumsum(sums, 0)
    tile = tl.min(tl.where((passed > goal) & (sums > 0), numbers, TILES), 0)
    tile = tl.where(tile == TILES, tl.max(tl.where(sums > 0, numbers, 0), 0), tile)
    return tile, tl.sum(tl.where(numbers == tile, passed - sums, 0.0), 0)


@triton.jit
def _choose(row, n, best, sums, goal, threshold, m, c, TILES: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """The first kept element whose cumulative weight passes `goal`, and its logit; of tile `best` where goal < 0."""
    tile, before = _passing_tile(sums, goal, TILES)
    tile = tl.where(goal < 0, best, tile)
    first = tl.full((), 0x7FFFFFFF, tl.int32)
    last = tl.full((), 0, tl.int32)
    for begin in range(tile * BLOCK, tl.minimum((tile + 1) * BLOCK, n), 4 * LANES):
        at = begin + tl.arange(0, 4 * LANES)
        x = load_tile(row, at, n, True)
        weight = tl.where(_kept(x, threshold), tl.exp2((x - m) * c), 0.0)
        passed = before + tl.cumsum(weight.to(tl.float64), 0)
        first = tl.minimum(first, tl.min(tl.where((passed > goal) & (weight > 0), at, 0x7FFFFFFF), 0))
        last = tl.maximum(last, tl.max(tl.where(weight > 0, at, 0), 0))
        before += tl.sum(weight.to(tl.float64), 0)
    token = tl.where(first == 0x7FFFFFFF, last, first)
    return token, tl.load(row + token).to(tl.float32)


@triton.jit
def _threshold(
    row, n, top_k, top_p, min_p, temperature, m, c, total, TILES: tl.constexpr, LOW_BITS: tl.constexpr, BLOCK: tl.constexpr,
    LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """What the cuts leave is at or above it."""
    threshold = tl.full((), float("-inf"), tl.float32)
    if top_k > 0:
        threshold = _search(row, n, top_k.to(tl.float64), m, c, False, LOW_BITS, BLOCK, LANES, VECTOR)
        if top_p < 1:
            sums, _ = _weigh(row, n, threshold, m, c, TILES, BLOCK, LANES, VECTOR)
            total = tl.sum(sums, 0)
    if top_p < 1:
        nucleus = _search(row, n, top_p * total, m, c, True, LOW_BITS, BLOCK, LANES, VECTOR)
        threshold = tl.maximum(threshold, nucleus)
    if min_p > 0:
        least = m.to(tl.float64) + tl.log(min_p) * temperature
        limit = least.to(tl.float32)
        next = _value(_key(limit) + 1, 0)
        threshold = tl.maximum(threshold, tl.where(limit.to(tl.float64) < least, next, limit))
    return threshold


@triton.jit(do_not_specialize=_RUNTIME)
def _sample(
    logits, temperatures, top_ks, top_ps, min_ps, seeds, tokens, logprobs, thresholds, counts, values, columns,
    inner, outer_stride, inner_stride, vocab, temperature, top_k, top_p, min_p, seed,
    CUT: tl.constexpr, TILES: tl.constexpr, LOW_BITS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """`values` and `columns` (rows, BLOCK) are work space of the cuts."""
    number = tl.program_id(0)
    row = logits + row_start(number, inner, outer_stride, inner_stride, VECTOR)
    temperature = _setting(temperatures, number, temperature)
    greedy = temperature == 0
    scale = tl.where(greedy, 1.0, 1 / tl.where(greedy, 1.0, temperature))
    c = (scale * LOG2E).to(tl.float32)
    m, best, sums = _statistics(row, vocab, c, TILES, BLOCK, LANES, VECTOR)
    total = tl.sum(sums, 0)
    token = tl.full((), -1, tl.int64)
    logprob = tl.full((), float("nan"), tl.float64)
    threshold = m
    count = tl.full((), 0, tl.int32)
    if (total == total) & (tl.abs(m) < float("inf")):
        size = tl.full((), vocab, tl.int32)
        aside = size < 0
        if not greedy:
            threshold = tl.full((), float("-inf"), tl.float32)
            if CUT:
                kept = tl.full((), top_k, tl.int64)
                if top_ks is not None:
                    kept = tl.load(top_ks + number)
                kept = tl.where(kept < vocab, kept, 0)
                nucleus = _setting(top_ps, number, top_p)
                if (kept > 0) | (nucleus < 1):
                    mass = nucleus * total * 1.00001  # not a matter of rounding whether the depth holds the nucleus
                    depth, count = _depth(row, vocab, kept, mass, m, c, BLOCK, LANES, VECTOR)
                    aside = (depth > 0) & (count <= BLOCK)
                    if aside:
                        place = number.to(tl.int64) * BLOCK
                        _set_aside(row, vocab, depth, m, c, values + place, columns + place, 8 * LANES)
                        tl.debug_barrier()
                        row = values + place
                        size = count
                threshold = _threshold(
                    row, size, kept, nucleus, _setting(min_ps, number, min_p), temperature, m, c, total,
                    TILES, LOW_BITS, BLOCK, LANES, VECTOR,
                )  # fmt: skip
        if CUT or counts is not None:
            sums, count = _weigh(row, size, threshold, m, c, TILES, BLOCK, LANES, VECTOR)
            total = tl.sum(sums, 0)
        if seeds is not None:
            uniform = _uniform(tl.load(seeds + number), number * 0)
        else:
            uniform = _uniform(tl.full((), seed, tl.int64), number)
        goal = tl.where(greedy, -1.0, uniform * total)
        chosen, x = _choose(row, size, best, sums, goal, threshold, m, c, TILES, BLOCK, LANES)
        token = chosen.to(tl.int64)
        if CUT:
            token = tl.load(columns + number.to(tl.int64) * BLOCK + chosen, mask=aside, other=chosen).to(tl.int64)
        logprob = tl.where(greedy, 0.0, (x.to(tl.float64) - m) * scale - tl.log(total))
    tl.store(tokens + number, token)
    if logprobs is not None:
        tl.store(logprobs + number, logprob.to(tl.float32))
    if thresholds is not None:
        tl.store(thresholds + number, threshold)
    if counts is not None:
        tl.store(counts + number, count.to(tl.int64))


@triton.jit(do_not_specialize=_RUNTIME)
def _kept_indices(
    logits, thresholds, indptr, indices, inner, outer_stride, inner_stride, vocab,
    BLOCK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    row = logits + row_start(number, inner, outer_stride, inner_stride, VECTOR)
    threshold = tl.load(thresholds + number)
    to = indices + tl.load(indptr + number)
    for begin in range(0, vocab, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        kept = _kept(load_tile(row, column, vocab, True), threshold)
        count = tl.sum(kept.to(tl.int32), 0)
        if count > 0:
            tl.store(to + tl.cumsum(kept.to(tl.int32), 0) - 1, column.to(tl.int64), mask=kept)
            to += count


def _bits(x: float) -> int:
    return int(struct.unpack("q", struct.pack("d", x))[0])


def sample(
    logits: Tensor, temperatures: Tensor | None, top_ks: Tensor | None, top_ps: Tensor | None, min_ps: Tensor | None,
    seeds: Tensor | None, *, temperature: float, top_k: int, top_p: float, min_p: float, seed: int,
    tokens: Tensor, logprobs: Tensor | None, thresholds: Tensor | None, counts: Tensor | None,
) -> None:  # fmt: skip
    """A token a row, its log-probability among the kept, the kept set's threshold and size; -1 where none can be drawn."""
    vocab = logits.shape[-1]
    chosen = row_tile("sampling.sample", logits)
    cut = top_ks is not None or top_ps is not None or min_ps is not None or 0 < top_k < vocab or top_p < 1 or min_p > 0
    rows = tokens.numel()
    space: list[Tensor | None] = [None, None]
    if cut:
        shape = (rows, chosen["BLOCK"])
        space = [torch.empty(shape, dtype=d, device=logits.device) for d in (logits.dtype, torch.int32)]
    launch(
        _sample, (rows,), logits, temperatures, top_ks, top_ps, min_ps, seeds, tokens, logprobs, thresholds, counts, *space,
        *rows_of(logits), vocab, _bits(temperature), top_k, _bits(top_p), _bits(min_p), seed, CUT=cut,
        TILES=triton.next_power_of_2(triton.cdiv(vocab, chosen["BLOCK"])), LOW_BITS=_LOW_BITS[logits.dtype], **chosen,
    )  # fmt: skip


def kept_indices(logits: Tensor, thresholds: Tensor, indptr: Tensor, indices: Tensor) -> None:
    """The columns of each row at or above its threshold, in rising order, at indptr."""
    launch(
        _kept_indices, (thresholds.numel(),), logits, thresholds, indptr, indices, *rows_of(logits), logits.shape[-1],
        **row_tile("sampling.kept_indices", logits),
    )  # fmt: skip
