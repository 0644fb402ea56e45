"""The Hopper kernels of the fused head, called through the binding: on the device, or built for the host (tests/cuda_host)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fastrlhf.kernels.logprobs import reference
from fastrlhf.ops import backend as backends
from torch import Tensor

Statistics = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # logprobs, entropy, lse, max, log_sum
Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


def available() -> bool:
    """In this build, for this machine."""
    module = backends.cuda_extension()
    if module is None or not hasattr(module, "has_linear_logprobs"):
        return False
    capability = (0, 0) if module.host else torch.cuda.get_device_capability()
    return bool(module.has_linear_logprobs(*capability))


def filled(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """NaN, so that what is not written shows."""
    return torch.full(shape, torch.nan, dtype=dtype, device=like.device)


def unfilled(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """For what is timed."""
    return torch.empty(shape, dtype=dtype, device=like.device)


@dataclass
class Head:
    hidden: Tensor  # (N, H) bfloat16
    weight: Tensor  # (V, H) bfloat16
    labels: Tensor  # (N)
    bias: Tensor | None = None
    temperature: float = 1.0
    temperatures: Tensor | None = None  # (N) float64
    softcap: float = 0.0
    vocab_start: int = 0
    ignore_index: int = -100
    row_count: Tensor | None = None
    allocate: Callable[..., Tensor] = filled

    def rows(self, which: slice) -> Head:
        picked = {"hidden": self.hidden[which], "labels": self.labels[which]}
        if self.temperatures is not None:
            picked["temperatures"] = self.temperatures[which]
        return Head(**self.__dict__ | picked)

    def columns(self, start: int, end: int) -> Head:
        bias = None if self.bias is None else self.bias[start:end]
        return Head(**self.__dict__ | {"weight": self.weight[start:end], "bias": bias, "vocab_start": self.vocab_start + start})

    def arguments(self) -> tuple[Any, ...]:
        code = backends.DTYPES
        operands = [(t.data_ptr(), code[t.dtype], t.stride(0)) for t in (self.hidden, self.weight)]
        count = (0, 5) if self.row_count is None else (self.row_count.data_ptr(), code[self.row_count.dtype])
        shape = (len(self.hidden), len(self.weight), self.hidden.shape[1], *count)
        bias = (0, 0) if self.bias is None else (self.bias.data_ptr(), code[self.bias.dtype])
        return *operands, shape, self._labels(), self._scaling(), bias

    def _labels(self) -> tuple[Any, ...]:
        end = self.vocab_start + len(self.weight)
        return self.labels.data_ptr(), backends.DTYPES[self.labels.dtype], 1, self.vocab_start, end, self.ignore_index

    def _scaling(self) -> tuple[Any, ...]:
        return self.temperature, backends.address(self.temperatures), self.softcap

    def partials(self, out: Tensor | None = None) -> Tensor:
        """(parts, N, 4)"""
        kernels = backends.cuda_extension()
        if out is None:
            out = self.allocate((kernels.linear_logprobs_parts(len(self.weight)), len(self.hidden), 4), self.hidden)
        kernels.linear_logprobs_partials(*self.arguments(), out.data_ptr(), backends.raw_stream(self.hidden))
        return out

    def combined(self, partials: Tensor) -> Statistics:
        out = [self.allocate((len(self.hidden),), self.hidden) for _ in range(5)]
        backends.cuda_extension().logprobs_combine(
            (0, 0, 1, 0, 0), len(self.hidden), len(self.weight), self._labels(), self._scaling(),
            tuple(t.data_ptr() for t in out), partials.data_ptr(), len(partials), backends.raw_stream(self.hidden),
        )  # fmt: skip
        return out[0], out[1], out[2], out[3], out[4]

    def statistics(self) -> Statistics:
        return self.combined(self.partials())

    def gradient(self, of: Statistics, grads: Grads, dtype: torch.dtype = torch.bfloat16, out: Tensor | None = None) -> Tensor:
        """(N, V) of a workspace whose rows begin at multiples of 16 bytes."""
        if out is None:
            out = self.allocate((len(self.hidden), -(-len(self.weight) // 8) * 8 + 8), self.hidden, dtype)
        backends.cuda_extension().linear_logprobs_strip_gradient(
            *self.arguments(), (0, of[1].data_ptr(), 0, of[3].data_ptr(), of[4].data_ptr()),
            tuple(backends.address(g) for g in grads), (out.data_ptr(), backends.DTYPES[out.dtype], out.stride(0)),
            backends.raw_stream(self.hidden),
        )  # fmt: skip
        return out[:, : len(self.weight)]

    def exponentials(self) -> tuple[Tensor, Tensor, Tensor]:
        """Partials (parts, N, 4), and what the gradient is made of: exponentials (N, V) bfloat16, references (tiles, N)."""
        kernels, rows, vocab = backends.cuda_extension(), len(self.hidden), len(self.weight)
        partials = self.allocate((kernels.linear_logprobs_parts(vocab), rows, 4), self.hidden)
        kept = self.allocate((rows, -(-vocab // 8) * 8 + 8), self.hidden, torch.bfloat16)
        references = self.allocate((-(-vocab // 256), rows), self.hidden)
        kernels.linear_logprobs_exponentials(
            *self.arguments(), partials.data_ptr(), (kept.data_ptr(), 1, kept.stride(0)), references.data_ptr(),
            backends.raw_stream(self.hidden),
        )  # fmt: skip
        return partials, kept, references

    def gradient_in_place(self, of: Statistics, grads: Grads, kept: Tensor, references: Tensor) -> Tensor:
        _, _, shape, labels, scaling, _ = self.arguments()
        backends.cuda_extension().linear_logprobs_exponentials_to_gradient(
            shape, labels, scaling, (of[0].data_ptr(), of[1].data_ptr(), 0, of[3].data_ptr(), of[4].data_ptr()),
            tuple(backends.address(g) for g in grads), (kept.data_ptr(), 1, kept.stride(0)), references.data_ptr(),
            backends.raw_stream(self.hidden),
        )  # fmt: skip
        return kept[:, : len(self.weight)]

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Logits before the soft cap, a leaf, and logprobs, entropy and lse of them, by the definition. The bias is added in
        float32, as whoever holds float32 logits does."""
        logits = self.hidden.to(dtype) @ self.weight.to(dtype).T
        if self.bias is not None:
            logits = (logits.float() + self.bias.float()).to(dtype) if dtype == torch.float64 else logits + self.bias.float()
        leaf = logits.requires_grad_()
        temperature = self.temperature if self.temperatures is None else self.temperatures.to(dtype)
        out = reference.logprobs(
            leaf, self.labels - self.vocab_start * (self.labels != self.ignore_index), temperature=temperature,
            softcap=self.softcap or None, ignore_index=self.ignore_index,
        )  # fmt: skip
        return leaf, (out[0], out[1], out[2])


def head(rows: int, vocab: int, width: int, *, spread: float = 3.0, device: str | None = None, **options: Any) -> Head:
    """Logits with a standard deviation of `spread`."""
    hidden = (torch.randn(rows, width, device=device) * (spread / width**0.5)).bfloat16()
    weight = torch.randn(vocab, width, device=device).bfloat16()
    labels = options.pop("labels", None)
    if labels is None:
        labels = torch.randint(0, vocab, (rows,), device=device)
    return Head(hidden, weight, labels, **options)
