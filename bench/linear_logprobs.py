"""The head: hidden states to log-probs and gradients. Floor: the products themselves, 2 N V H flops forward, 8 N V H with the
gradients (6 where they are made in the forward), as torch multiplies in strips that fit its cache best."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fastrlhf
import torch
from torch import Tensor

from . import peers
from .harness import OURS, Case, Variant

CHECKED = 32  # rows compared with float64
STRIP = 4096  # columns that the bare products take at a time; 2048 and 8192 were no faster
BARE = "bare products"
FUSED = "torch F.linear_cross_entropy"


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return torch.log_softmax((hidden @ weight.T).float(), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def bare(hidden: Tensor, weight: Tensor, backward: bool) -> tuple[Tensor, ...]:
    rows = hidden.shape[0]
    tile = torch.empty(rows, STRIP, dtype=hidden.dtype)
    gh, gw = (torch.zeros_like(hidden), torch.empty_like(weight)) if backward else (None, None)
    for start in range(0, weight.shape[0], STRIP):
        w = weight[start : start + STRIP]
        x = tile[:, : w.shape[0]]
        torch.mm(hidden, w.T, out=x)
        if gh is not None and gw is not None:
            torch.mm(hidden, w.T, out=x)  # the recomputation
            gh.addmm_(x, w)
            torch.mm(x.T, hidden, out=gw[start : start + STRIP])
    return () if gh is None or gw is None else (gh, gw)


def cases(short: bool) -> Iterator[Case]:
    if short:
        yield from _cases(128, 8192, 128, others=True)
    else:
        yield from _cases(1024, 32768, 1024, others=True)
        yield from _cases(4096, 128256, 1024, others=False)  # the others take minutes a run there


def _cases(rows: int, vocab: int, width: int, *, others: bool) -> Iterator[Case]:
    verl = peers.find("verl.utils.experimental.torch_functional", "FusedLinearForPPOFunction")
    trl = peers.find("trl.kernels", "ChunkedLogProbFunction")
    torch_fused = peers.find("torch.nn.functional", "linear_cross_entropy")
    options = peers.find("torch.nn", "LinearCrossEntropyOptions")
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        hidden = torch.randn(rows, width).to(dtype)
        weight = (torch.randn(vocab, width) * (2 / width**0.5)).to(dtype)
        labels = torch.randint(0, vocab, (rows,))
        name = f"{rows}x{vocab}x{width} {str(dtype)[6:]}"

        def exact(h: Tensor = hidden[:CHECKED], w: Tensor = weight, y: Tensor = labels[:CHECKED]) -> Tensor:
            return plain(h.double(), w.double(), y)

        functions = {OURS: lambda h, w, y: fastrlhf.linear_logprobs(h, w, y).logprobs}
        if others:
            functions["torch eager"] = plain
        if others and trl:
            functions["trl ChunkedLogProbFunction"] = lambda h, w, y: trl.apply(h, w, None, y, 1.0, 8192, None, 1.0, ())[0]
        if others and verl:
            functions["verl FusedLinearForPPOFunction"] = lambda h, w, y: verl.apply(h, w, y, 1.0, 512)[0]
        if others and torch_fused and options:
            chunked = options()
            functions[FUSED] = lambda h, w, y: -torch_fused(h, w, y, reduction="none", options=chunked)

        def forward(f, h=hidden, w=weight, y=labels) -> Variant:
            def run() -> None:
                with torch.no_grad():
                    f(h, w, y)

            def value() -> Tensor:
                with torch.no_grad():
                    return f(h[:CHECKED], w, y[:CHECKED])

            return Variant(run, value)

        def both(f, h=hidden, w=weight, y=labels) -> Variant:
            h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
            upstream = torch.randn(h.shape[0])

            def run() -> tuple[Tensor, ...]:
                out = f(h, w, y)
                return torch.autograd.grad(out, (h, w), upstream.to(out.dtype))

            return Variant(run)

        variants = {n: forward(f) for n, f in functions.items()}
        variants[BARE] = Variant(lambda h=hidden, w=weight: bare(h, w, False))
        yield Case("linear_logprobs", f"forward {name}", variants, oracle=exact)

        if FUSED in functions:  # in chunks for a mean only
            functions[FUSED] = lambda h, w, y: torch_fused(h, w, y, reduction="mean", options=chunked).expand(len(y))
        variants = {n: both(f) for n, f in functions.items()}
        variants[BARE] = Variant(lambda h=hidden, w=weight: bare(h, w, True))
        variants[f"{OURS} linear_policy_loss"] = _policy(hidden, weight, labels)
        if dtype == torch.bfloat16:  # what the bare products do: d logits in bfloat16
            rounded = {"workspace_dtype": torch.bfloat16}
            variants[f"{OURS} rounded"] = both(lambda h, w, y: fastrlhf.linear_logprobs(h, w, y, **rounded).logprobs)
            variants[f"{OURS} linear_policy_loss rounded"] = _policy(hidden, weight, labels, **rounded)
        yield Case("linear_logprobs", f"forward + backward {name}", variants)


def _policy(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Variant:
    h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    old, advantages = torch.full(labels.shape, -10.0), torch.randn(labels.shape)

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(fastrlhf.linear_policy_loss(h, w, labels, old, advantages, None, **options).loss, (h, w))

    return Variant(run)
