"""`logprobs` in Triton: one read forward, one read and one write backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import launch
from ..common.tiles import tile
from ..common.triton_rows import load_tile, row_start, row_tile, rows_of, store_tile, store_zeros, tile_columns
from ..common.triton_softmax import FLOOR, LN2, LOG2E, accumulate, add_one, anchor, log_of_sum, merge_lanes

_STEPS = 8  # tiles of a row that one program of the backward writes
_RUNTIME = ["inner", "rows", "ranks", "chunks", "ignore_index", "vocab_start"]


@triton.jit
def _tanh(x):
    """A polynomial below 0.625 (Cephes), 1 - 2 / (e^2|x| + 1) above, where only a part below 1/2 is rounded."""
    z = x * x
    q = -5.70498872745e-3 * z + 2.06390887954e-2
    q = q * z - 5.37397155531e-2
    q = q * z + 1.33314422036e-1
    q = q * z - 3.33332819422e-1
    size = tl.abs(x)
    large = 1 - 2 / (tl.exp2(size * (2 * LOG2E)) + 1)
    return tl.where(size < 0.625, q * z * x + x, tl.where(x < 0, -large, large))


@triton.jit
def soft_capped(x, softcap, CAPPED: tl.constexpr):
    if CAPPED:
        x = softcap * _tanh(x * (1 / softcap))
    return x


@triton.jit
def _scale(temperatures, row, scale):
    if temperatures is not None:
        scale = (1 / tl.load(temperatures + row)).to(tl.float32)
    return scale


@triton.jit
def _tile(logits, columns, vocab, softcap, CAPPED: tl.constexpr, TAIL: tl.constexpr):
    """A tile of a row as float32, soft-capped; -inf past its end."""
    x = soft_capped(load_tile(logits, columns, vocab, TAIL), softcap, CAPPED)
    if CAPPED and TAIL:
        x = tl.where(columns < vocab, x, float("-inf"))
    return x


@triton.jit
def _kept_tile(kept, columns, vocab, TAIL: tl.constexpr):
    if TAIL:
        return tl.load(kept + columns, mask=columns < vocab, other=0) != 0
    else:
        return tl.load(kept + columns) != 0


@triton.jit
def _gather(logits, column, here, softcap, CAPPED: tl.constexpr):
    """Logits as float32, soft-capped; -inf where `here` is not."""
    x = tl.load(logits + column, mask=here, other=float("-inf")).to(tl.float32)
    return tl.where(here, soft_capped(x, softcap, CAPPED), float("-inf"))


@triton.jit
def _label(labels, row, k, labels_per_row):
    return tl.load(labels + row.to(tl.int64) * labels_per_row + k).to(tl.int64)


@triton.jit
def _counted(labels, row, labels_per_row, ignore_index):
    """How many of a row's labels count."""
    n = 0
    for k in range(labels_per_row):
        n += (_label(labels, row, k, labels_per_row) != ignore_index).to(tl.int32)
    return n


@triton.jit
def _column(label, vocab, vocab_start, ignore_index):
    """A label's column here, and whether there is one."""
    column = label - vocab_start
    return column, (label != ignore_index) & (column >= 0) & (column < vocab)


@triton.jit
def _is_first(labels, row, k, labels_per_row, label):
    """Whether none of the row's labels before the k-th is the same."""
    before = 0
    for j in range(k):
        before += (_label(labels, row, j, labels_per_row) == label).to(tl.int32)
    return before == 0


@triton.jit
def _not_a_label(ids, labels, row, labels_per_row):
    keep = ids == ids
    for k in range(labels_per_row):
        keep = keep & (ids != _label(labels, row, k, labels_per_row))
    return keep


@triton.jit
def _results(m, s, t, scale):
    """log s, the entropy log s - t/s and the lse m/T + log s, of float64."""
    log_sum = log_of_sum(s)
    entropy = log_sum - t / s
    return log_sum, tl.where(entropy < 0, 0.0, entropy), m * scale + log_sum


@triton.jit
def _write(to, at, value, mask):
    if to is not None:
        tl.store(to + at, value.to(tl.float32), mask=mask)


@triton.jit
def _write_ignored(row, labels_per_row, logprobs, entropy, lse, max, log_sum, partials):
    row = row.to(tl.int64)
    zero = tl.zeros((), tl.float32)
    if partials is not None:
        for i in range(3 + labels_per_row):
            tl.store(partials + row * (3 + labels_per_row) + i, zero)
    else:
        for k in range(labels_per_row):
            tl.store(logprobs + row * labels_per_row + k, zero)
        _write(entropy, row, zero, None)
        _write(lse, row, zero, None)
        _write(max, row, zero, None)
        _write(log_sum, row, zero, None)


@triton.jit(do_not_specialize=_RUNTIME)
def _forward(
    logits, labels, temperatures, kept_mask, kept_indptr, kept_indices, logprobs, entropy, lse, max, log_sum, partials,
    inner, outer_stride, inner_stride, vocab, labels_per_row, scale, softcap, ignore_index, vocab_start,
    WEIGHTED: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if _counted(labels, row, labels_per_row, ignore_index) == 0:
        _write_ignored(row, labels_per_row, logprobs, entropy, lse, max, log_sum, partials)
    else:
        logits += row_start(row, inner, outer_stride, inner_stride, VECTOR)
        scale = _scale(temperatures, row, scale)
        c = scale * LOG2E
        m = tl.full((LANES,), float("-inf"), tl.float32)
        s = tl.zeros((LANES,), tl.float32)
        t = tl.zeros((LANES,), tl.float32)
        if kept_indptr is not None:
            end = tl.load(kept_indptr + row + 1)
            for begin in range(tl.load(kept_indptr + row), end, LANES):
                at = begin + tl.arange(0, LANES)[:, None, None]
                ids = tl.load(kept_indices + at, mask=at < end, other=-1)
                here = (at < end) & (ids >= vocab_start) & (ids < vocab_start + vocab)
                here = here & _not_a_label(ids, labels, row, labels_per_row)
                x = _gather(logits, ids - vocab_start, here, softcap, CAPPED)
                m, s, t = accumulate(x, m, s, t, c, WEIGHTED)
        else:
            kept_row = tl.multiple_of(row.to(tl.int64) * vocab, VECTOR)
            columns = tile_columns(BLOCK, LANES, VECTOR)
            full = vocab // BLOCK * BLOCK
            for begin in range(0, full, BLOCK):
                x = _tile(logits, begin + columns, vocab, softcap, CAPPED, False)
                if kept_mask is not None:
                    x = tl.where(_kept_tile(kept_mask + kept_row, begin + columns, vocab, False), x, float("-inf"))
                m, s, t = accumulate(x, m, s, t, c, WEIGHTED)
            if full < vocab:
                x = _tile(logits, full + columns, vocab, softcap, CAPPED, True)
                if kept_mask is not None:
                    x = tl.where(_kept_tile(kept_mask + kept_row, full + columns, vocab, True), x, float("-inf"))
                m, s, t = accumulate(x, m, s, t, c, WEIGHTED)
        high, total, weighted = merge_lanes(m, s, t, c, WEIGHTED)
        if (kept_mask is not None) | (kept_indptr is not None):  # the labels count as kept, whatever the set says
            for k in range(labels_per_row):
                label = _label(labels, row, k, labels_per_row)
                column, missing = _column(label, vocab, vocab_start, ignore_index)
                missing = missing & _is_first(labels, row, k, labels_per_row, label)
                if kept_mask is not None:
                    missing = missing & (tl.load(kept_mask + row.to(tl.int64) * vocab + column, mask=missing, other=1) == 0)
                if missing:
                    z = _gather(logits, column, missing, softcap, CAPPED)
                    high, total, weighted = add_one(high, total, weighted, z, c)
        at = row.to(tl.int64)
        weighted = weighted * LN2
        if partials is not None:
            partials += at * (3 + labels_per_row)
            tl.store(partials, high)
            tl.store(partials + 1, total.to(tl.float32))
            tl.store(partials + 2, weighted.to(tl.float32))
        log_total, row_entropy, row_lse = _results(high.to(tl.float64), total, weighted, scale)
        if partials is None:
            _write(entropy, at, row_entropy, None)
            _write(lse, at, row_lse, None)
            _write(max, at, high, None)
            _write(log_sum, at, log_total, None)
        for k in range(labels_per_row):
            label = _label(labels, row, k, labels_per_row)
            column, here = _column(label, vocab, vocab_start, ignore_index)
            z = _gather(logits, column, here, softcap, CAPPED)
            if partials is not None:
                tl.store(partials + 3 + k, z)
            else:
                logprob = (z.to(tl.float64) - high) * scale - log_total
                tl.store(logprobs + at * labels_per_row + k, tl.where(label == ignore_index, 0.0, logprob).to(tl.float32))


@triton.jit(do_not_specialize=_RUNTIME)
def _combine(
    labels, temperatures, partials, logprobs, entropy, lse, max, log_sum,
    rows, ranks, labels_per_row, scale, ignore_index, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row a lane: the ranks' statistics in rank order."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    at = row.to(tl.int64)
    width = 3 + labels_per_row
    scale = tl.full((BLOCK,), scale, tl.float64)
    if temperatures is not None:
        scale = 1 / tl.load(temperatures + at, mask=inside, other=1.0)
    m = tl.full((BLOCK,), float("-inf"), tl.float64)
    s = tl.zeros((BLOCK,), tl.float64)
    t = tl.zeros((BLOCK,), tl.float64)
    for rank in range(ranks):
        one = partials + (rank * rows.to(tl.int64) + at) * width
        high = tl.load(one, mask=inside, other=0).to(tl.float64)
        base = anchor(tl.maximum(m, high))
        ours = tl.maximum((m - base) * scale, FLOOR * 10)  # e^-2000 is 0 in float64 too
        theirs = tl.maximum((high - base) * scale, FLOOR * 10)
        total = tl.load(one + 1, mask=inside, other=0).to(tl.float64)
        weighted = tl.load(one + 2, mask=inside, other=0).to(tl.float64)
        t = (t + s * ours) * tl.exp(ours) + (weighted + total * theirs) * tl.exp(theirs)
        s = s * tl.exp(ours) + total * tl.exp(theirs)
        m = tl.maximum(m, high)
    log_total, row_entropy, row_lse = _results(m, s, t, scale)
    counted = tl.zeros((BLOCK,), tl.int32)
    for k in range(labels_per_row):
        z = tl.full((BLOCK,), float("-inf"), tl.float64)
        for rank in range(ranks):
            one = partials + (rank * rows.to(tl.int64) + at) * width
            y = tl.load(one + 3 + k, mask=inside, other=0).to(tl.float64)
            z = tl.where(y <= z, z, y)
        counts = tl.load(labels + at * labels_per_row + k, mask=inside, other=0).to(tl.int64) != ignore_index
        counted += counts.to(tl.int32)
        logprob = tl.where(counts, (z - m) * scale - log_total, 0.0)
        tl.store(logprobs + at * labels_per_row + k, logprob.to(tl.float32), mask=inside)
    counts = counted > 0
    _write(entropy, at, tl.where(counts, row_entropy, 0.0), inside)
    _write(lse, at, tl.where(counts, row_lse, 0.0), inside)
    _write(max, at, tl.where(counts, m, 0.0), inside)
    _write(log_sum, at, tl.where(counts, log_total, 0.0), inside)


@triton.jit
def _upstream(labels, grad_logprobs, grad_entropy, grad_lse, row, labels_per_row, ignore_index):
    """A row's gradients: the sum of its labels', the entropy's, the lse's, and whether any is not 0."""
    total = 0.0
    g_entropy = 0.0
    g_lse = 0.0
    any = 0
    if grad_logprobs is not None:
        for k in range(labels_per_row):
            counts = _label(labels, row, k, labels_per_row) != ignore_index
            g = tl.load(grad_logprobs + row.to(tl.int64) * labels_per_row + k, mask=counts, other=0)
            total += g
            any |= (g != 0).to(tl.int32)
    if grad_entropy is not None:
        g_entropy = tl.load(grad_entropy + row)
        any |= (g_entropy != 0).to(tl.int32)
    if grad_lse is not None:
        g_lse = tl.load(grad_lse + row)
        any |= (g_lse != 0).to(tl.int32)
    return total, g_entropy, g_lse, any


@triton.jit
def _coefficients(max, log_sum, entropy, row, total, g_entropy, g_lse, scale, WEIGHTED: tl.constexpr):
    """dx_i = p_i (g_lse - G - g_H (log p_i + H)) / T + labels = 2^u (constant + slope u) + labels: m, constant, slope."""
    log_total = tl.load(log_sum + row)
    inverse = tl.exp2(-log_total * LOG2E) * scale
    constant = g_lse - total
    slope = 0.0
    if WEIGHTED:
        constant -= g_entropy * (tl.load(entropy + row) - log_total)
        slope = -g_entropy * inverse * LN2
    return anchor(tl.load(max + row)), constant * inverse, slope


@triton.jit
def _softmax_part(x, m, c, constant, slope, WEIGHTED: tl.constexpr):
    u = (x - m) * c
    if WEIGHTED:
        constant += slope * tl.maximum(u, FLOOR)
    return tl.exp2(u) * constant


@triton.jit
def _chain(gradient, x, softcap, CAPPED: tl.constexpr):
    """Through x = softcap · tanh(logit / softcap); x may be -inf where the gradient is 0."""
    if CAPPED:
        slope = (softcap - x) * (softcap + x) * (1 / (softcap * softcap))  # the factor that is near 0 is exact
        gradient = tl.where(gradient != 0, gradient * slope, gradient)
    return gradient


@triton.jit
def _gradient_tile(
    logits, kept_mask, kept_row, grad, labels, grad_logprobs, row, begin, columns, vocab, labels_per_row, ignore_index,
    vocab_start, m, c, scale, constant, slope, softcap,
    WEIGHTED: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    x = _tile(logits, begin + columns, vocab, softcap, CAPPED, TAIL)
    if kept_mask is not None:
        keep = _kept_tile(kept_mask + kept_row, begin + columns, vocab, TAIL)
        for k in range(labels_per_row):
            column, here = _column(_label(labels, row, k, labels_per_row), vocab, vocab_start, ignore_index)
            keep = keep | ((begin + columns == column) & here)
        x = tl.where(keep, x, float("-inf"))
    gradient = _softmax_part(x, m, c, constant, slope, WEIGHTED)
    if grad_logprobs is not None:
        for k in range(labels_per_row):
            label = _label(labels, row, k, labels_per_row)
            column = label - vocab_start - begin
            if (label != ignore_index) & (column >= 0) & (column < BLOCK):
                g = tl.load(grad_logprobs + row.to(tl.int64) * labels_per_row + k) * scale
                gradient += tl.where(columns == column, g, 0.0)
    store_tile(grad, begin + columns, _chain(gradient, x, softcap, CAPPED), vocab, TAIL)


@triton.jit(do_not_specialize=_RUNTIME)
def _backward(
    logits, labels, temperatures, kept_mask, max, log_sum, entropy, grad_logprobs, grad_entropy, grad_lse, grad,
    inner, outer_stride, inner_stride, grad_outer_stride, grad_inner_stride, vocab, labels_per_row, chunks,
    scale, softcap, ignore_index, vocab_start,
    WEIGHTED: tl.constexpr, CAPPED: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """STEPS tiles of a row a program."""
    row = tl.program_id(0) // chunks
    begin = tl.program_id(0) % chunks * (STEPS * BLOCK)
    end = tl.minimum(begin + STEPS * BLOCK, vocab)
    grad += row_start(row, inner, grad_outer_stride, grad_inner_stride, VECTOR)
    total, g_entropy, g_lse, any = _upstream(labels, grad_logprobs, grad_entropy, grad_lse, row, labels_per_row, ignore_index)
    if (any == 0) | (_counted(labels, row, labels_per_row, ignore_index) == 0):
        store_zeros(grad, begin, end, BLOCK, LANES, VECTOR)
    else:
        logits += row_start(row, inner, outer_stride, inner_stride, VECTOR)
        kept_row = tl.multiple_of(row.to(tl.int64) * vocab, VECTOR)
        scale = _scale(temperatures, row, scale)
        m, constant, slope = _coefficients(max, log_sum, entropy, row, total, g_entropy, g_lse, scale, WEIGHTED)
        c = scale * LOG2E
        columns = tile_columns(BLOCK, LANES, VECTOR)
        full = end // BLOCK * BLOCK
        for at in range(begin, full, BLOCK):
            _gradient_tile(
                logits, kept_mask, kept_row, grad, labels, grad_logprobs, row, at, columns, vocab, labels_per_row,
                ignore_index, vocab_start, m, c, scale, constant, slope, softcap, WEIGHTED, CAPPED, BLOCK, False,
            )  # fmt: skip
        if full < end:
            _gradient_tile(
                logits, kept_mask, kept_row, grad, labels, grad_logprobs, row, full, columns, vocab, labels_per_row,
                ignore_index, vocab_start, m, c, scale, constant, slope, softcap, WEIGHTED, CAPPED, BLOCK, True,
            )  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME)
def _backward_listed(
    logits, labels, temperatures, kept_indptr, kept_indices, max, log_sum, entropy, grad_logprobs, grad_entropy, grad_lse,
    grad, inner, outer_stride, inner_stride, grad_outer_stride, grad_inner_stride, vocab, labels_per_row,
    scale, softcap, ignore_index, vocab_start,
    WEIGHTED: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """A row a program: zeros, then the columns that a CSR kept set names, then the labels."""
    row = tl.program_id(0)
    grad += row_start(row, inner, grad_outer_stride, grad_inner_stride, VECTOR)
    store_zeros(grad, 0, vocab, BLOCK, LANES, VECTOR)
    total, g_entropy, g_lse, any = _upstream(labels, grad_logprobs, grad_entropy, grad_lse, row, labels_per_row, ignore_index)
    if (any != 0) & (_counted(labels, row, labels_per_row, ignore_index) != 0):
        tl.debug_barrier()
        logits += row_start(row, inner, outer_stride, inner_stride, VECTOR)
        scale = _scale(temperatures, row, scale)
        m, constant, slope = _coefficients(max, log_sum, entropy, row, total, g_entropy, g_lse, scale, WEIGHTED)
        c = scale * LOG2E
        end = tl.load(kept_indptr + row + 1)
        for begin in range(tl.load(kept_indptr + row), end, LANES):
            at = begin + tl.arange(0, LANES)
            ids = tl.load(kept_indices + at, mask=at < end, other=-1)
            here = (at < end) & (ids >= vocab_start) & (ids < vocab_start + vocab)
            here = here & _not_a_label(ids, labels, row, labels_per_row)
            x = _gather(logits, ids - vocab_start, here, softcap, CAPPED)
            gradient = _chain(_softmax_part(x, m, c, constant, slope, WEIGHTED), x, softcap, CAPPED)
            tl.store(grad + ids - vocab_start, gradient.to(grad.dtype.element_ty), mask=here)
        for k in range(labels_per_row):
            label = _label(labels, row, k, labels_per_row)
            column, here = _column(label, vocab, vocab_start, ignore_index)
            x = _gather(logits, column, here, softcap, CAPPED)
            gradient = _softmax_part(x, m, c, constant, slope, WEIGHTED)
            if grad_logprobs is not None:
                for j in range(labels_per_row):
                    same = _label(labels, row, j, labels_per_row) == label
                    gradient += tl.load(grad_logprobs + row.to(tl.int64) * labels_per_row + j, mask=same, other=0) * scale
            gradient = _chain(gradient, x, softcap, CAPPED)
            tl.store(grad + column, gradient.to(grad.dtype.element_ty), mask=here)


def forward(
    logits: Tensor, labels: Tensor, temperatures: Tensor | None, kept_mask: Tensor | None, kept_indptr: Tensor | None,
    kept_indices: Tensor | None, *, temperature: float, softcap: float, ignore_index: int, vocab_start: int,
    logprobs: Tensor | None, entropy: Tensor | None, lse: Tensor | None, max: Tensor | None, log_sum: Tensor | None,
    partials: Tensor | None,
) -> None:  # fmt: skip
    """Log-probs (rows · K), entropy, lse, max and log-sum (rows), those wanted; or only partials (rows, 3 + K)."""
    vocab = logits.shape[-1]
    rows = logits.numel() // vocab
    if rows == 0:
        return
    mask = None if kept_mask is None else kept_mask.view(torch.uint8)
    launch(
        _forward, (rows,), logits, labels, temperatures, mask, kept_indptr, kept_indices, logprobs, entropy, lse, max, log_sum,
        partials, *rows_of(logits), vocab, labels.numel() // rows, 1 / temperature, softcap, ignore_index, vocab_start,
        WEIGHTED=entropy is not None or partials is not None, CAPPED=softcap != 0, **row_tile("logprobs.forward", logits),
    )  # fmt: skip


def combine(
    labels: Tensor, temperatures: Tensor | None, partials: Tensor, *, temperature: float, ignore_index: int,
    logprobs: Tensor, entropy: Tensor | None, lse: Tensor | None, max: Tensor | None, log_sum: Tensor | None,
) -> None:  # fmt: skip
    """The results of `forward` from all ranks' partials (ranks, rows, 3 + K)."""
    ranks, rows, width = partials.shape
    chosen = tile("logprobs.combine", partials, rows)
    launch(
        _combine, (triton.cdiv(rows, chosen["BLOCK"]),), labels, temperatures, partials, logprobs, entropy, lse, max, log_sum,
        rows, ranks, width - 3, 1 / temperature, ignore_index, **chosen,
    )  # fmt: skip


def backward(
    logits: Tensor, labels: Tensor, temperatures: Tensor | None, kept_mask: Tensor | None, kept_indptr: Tensor | None,
    kept_indices: Tensor | None, *, temperature: float, softcap: float, ignore_index: int, vocab_start: int,
    max: Tensor, log_sum: Tensor, entropy: Tensor | None, grad_logprobs: Tensor | None, grad_entropy: Tensor | None,
    grad_lse: Tensor | None, grad: Tensor,
) -> None:  # fmt: skip
    """The gradient of the logits; `grad` may be the logits themselves unless the kept set is CSR."""
    vocab = logits.shape[-1]
    rows = logits.numel() // vocab
    if rows == 0:
        return
    chosen = row_tile("logprobs.backward", logits, grad) | {"WEIGHTED": grad_entropy is not None, "CAPPED": softcap != 0}
    upstream = (max, log_sum, entropy, grad_logprobs, grad_entropy, grad_lse)
    strides = (*rows_of(logits), *rows_of(grad)[1:])
    options = (1 / temperature, softcap, ignore_index, vocab_start)
    labels_per_row = labels.numel() // rows
    if kept_indptr is not None:
        launch(
            _backward_listed, (rows,), logits, labels, temperatures, kept_indptr, kept_indices, *upstream, grad, *strides,
            vocab, labels_per_row, *options, **chosen,
        )  # fmt: skip
        return
    chunks = triton.cdiv(vocab, _STEPS * chosen["BLOCK"])
    mask = None if kept_mask is None else kept_mask.view(torch.uint8)
    launch(
        _backward, (rows * chunks,), logits, labels, temperatures, mask, *upstream, grad, *strides,
        vocab, labels_per_row, chunks, *options, STEPS=_STEPS, **chosen,
    )  # fmt: skip
