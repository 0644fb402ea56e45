"""The fused head's Hopper kernels behind `linear_logprobs`: rows that count are moved to the front on the device, and the
kernels stop at their number, which the host never learns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.linear_logprobs import chunked
from .backend import DTYPES, address, cuda_extension, empty, raw_stream

if TYPE_CHECKING:
    from .linear_logprobs import HeadCall, Results

_BYTES = 16  # every row begins at a multiple of them


def serves(call: HeadCall) -> bool:
    """bfloat16 rows at multiples of 16 bytes, one label a row, no kept set, a Hopper GPU and a build that has the kernels."""
    if call.hidden.dtype != torch.bfloat16 or call.weight.dtype != torch.bfloat16:
        return False
    if call.rows == 0 or call.labels.numel() != call.rows or call.kept_mask is not None or call.kept_indptr is not None:
        return False
    if any(t.data_ptr() % _BYTES or t.stride(0) * 2 % _BYTES for t in (call.flat, call.weight)):
        return False
    module = cuda_extension()
    capability = (0, 0) if module.host else torch.cuda.get_device_capability(call.hidden.device)
    return bool(module.has_linear_logprobs(*capability))


class Front:
    """A call's rows in another order: those that count first."""

    def __init__(self, call: HeadCall) -> None:
        ignored = call.ignored.squeeze(1)
        self.order = torch.argsort(ignored.to(torch.uint8), stable=True)
        self.count = (call.rows - ignored.sum()).reshape(1)
        self.hidden = call.clean[self.order]
        self.labels = call.labels.reshape(-1)[self.order]
        self.temperatures = None if call.temperatures is None else call.temperatures[self.order]
        self.call = call

    def arguments(self, columns: slice) -> tuple[Any, ...]:
        """Of the kernels, for some columns."""
        call, weight = self.call, self.call.weight[columns]
        operands = [(t.data_ptr(), DTYPES[t.dtype], t.stride(0)) for t in (self.hidden, weight)]
        shape = (call.rows, weight.shape[0], self.hidden.shape[1], self.count.data_ptr(), DTYPES[self.count.dtype])
        labels = (
            self.labels.data_ptr(), DTYPES[self.labels.dtype], 1, call.vocab_start + columns.start, call.vocab_total,
            call.ignore_index,
        )  # fmt: skip
        bias = (0, 0) if call.bias is None else (call.bias[columns].data_ptr(), DTYPES[call.bias.dtype])
        return *operands, shape, labels, (call.temperature, address(self.temperatures), call.softcap), bias


def statistics(call: HeadCall) -> Tensor:
    """(parts, rows, 4), in the rows' own order; those of ignored rows hold anything."""
    module, front = cuda_extension(), Front(call)
    vocab = call.weight.shape[0]
    partials = empty((module.linear_logprobs_parts(vocab), call.rows, 4), torch.float32, call.hidden)
    module.linear_logprobs_partials(*front.arguments(slice(0, vocab)), partials.data_ptr(), raw_stream(call.hidden))
    return torch.empty_like(partials).index_copy_(1, front.order, partials)


class Exponentials:
    """What a forward leaves of some rows, so that their gradient takes no second product: e^(x - reference) in bfloat16, turned
    into d logits where it lies."""

    def __init__(self, call: HeadCall) -> None:
        self.front, rows, vocab = Front(call), call.rows, call.weight.shape[0]
        module = cuda_extension()
        self.kept = torch.empty((rows, -(-vocab // 8) * 8), dtype=torch.bfloat16, device=call.hidden.device)
        self.references = torch.empty((-(-vocab // 256), rows), dtype=torch.float32, device=call.hidden.device)
        partials = empty((module.linear_logprobs_parts(vocab), rows, 4), torch.float32, call.hidden)
        self.arguments = self.front.arguments(slice(0, vocab))
        module.linear_logprobs_exponentials(
            *self.arguments, partials.data_ptr(), self._matrix(), self.references.data_ptr(), raw_stream(self.kept)
        )
        self.partials = torch.empty_like(partials).index_copy_(1, self.front.order, partials)

    def _matrix(self) -> tuple[int, int, int]:
        return self.kept.data_ptr(), DTYPES[torch.bfloat16], self.kept.stride(0)

    def add_gradients(
        self, results: Results, grads: tuple[Tensor | None, ...], sums: tuple[Tensor | None, Tensor | None, Tensor | None]
    ) -> None:
        """Adds to sums (rows, H), (V, H), (V), as `gradients`. Once: the exponentials are gone then."""
        order, call = self.front.order, self.front.call
        lp, H, _, m, log_sum = (None if t is None else t.reshape(-1)[order] for t in results)
        upstream = tuple(None if g is None else g.reshape(-1)[order] for g in grads)
        _, _, shape, labels, scaling, _ = self.arguments
        cuda_extension().linear_logprobs_exponentials_to_gradient(
            shape, labels, scaling, tuple(address(t) for t in (lp, H, None, m, log_sum)), tuple(address(g) for g in upstream),
            self._matrix(), self.references.data_ptr(), raw_stream(self.kept),
        )  # fmt: skip
        d = self.kept[:, : call.weight.shape[0]]
        grad_hidden, grad_weight, grad_bias = sums
        if grad_bias is not None:
            grad_bias += d.float().sum(0)
        if grad_hidden is not None:
            grad_hidden.index_add_(0, order, chunked.product(d, call.weight).to(grad_hidden.dtype))
        if grad_weight is not None:
            chunked.add_product(grad_weight, d.T, self.front.hidden)


def gradients(
    call: HeadCall, results: Results, grads: tuple[Tensor | None, ...], sums: tuple[Tensor | None, Tensor | None, Tensor | None]
) -> None:
    """Adds to sums (rows, H), (V, H), (V), float32 but for (V, H): strip by strip, d logits by the kernel, two products by
    torch."""
    front = Front(call)
    grad_hidden, grad_weight, grad_bias = sums

    def moved(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.reshape(-1)[front.order]

    of = tuple(moved(t) for t in (results.entropy, results.max, results.log_sum))
    upstream = tuple(moved(g) for g in grads)
    vocab, itemsize = call.weight.shape[0], call.round_to.itemsize
    width = max(chunked.SMALLEST, call.workspace_bytes // (call.rows * itemsize) // 256 * 256)
    room = torch.empty((call.rows, -(-min(width, vocab) // 8) * 8), dtype=call.round_to, device=call.hidden.device)
    ours = None if grad_hidden is None else torch.zeros_like(grad_hidden)
    for start in range(0, vocab, width):
        columns = slice(start, min(start + width, vocab))
        cuda_extension().linear_logprobs_strip_gradient(
            *front.arguments(columns), (0, address(of[0]), 0, address(of[1]), address(of[2])),
            tuple(address(g) for g in upstream), (room.data_ptr(), DTYPES[room.dtype], room.stride(0)), raw_stream(room),
        )  # fmt: skip
        d = room[:, : columns.stop - columns.start]
        if grad_bias is not None:
            grad_bias[columns] += d.float().sum(0)
        if ours is not None:
            chunked.product(d, call.weight[columns], ours)
        if grad_weight is not None:
            chunked.add_product(grad_weight[columns], d.T, front.hidden)
    if grad_hidden is not None and ours is not None:
        grad_hidden[front.order] += ours
