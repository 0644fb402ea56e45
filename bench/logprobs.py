"""Log-probs, with and without entropy, forward and with the gradient. Floor: one read of the logits; with the gradient,
two reads and a write."""

from __future__ import annotations

from collections.abc import Iterator

import fastrlhf
import torch
from torch import Tensor

from . import peers
from .harness import OURS, Case, Variant, compiled

CHECKED = 64  # rows compared with float64


def plain(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def plain_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    lp = torch.log_softmax(logits.float(), -1)
    return lp.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(lp.exp() * lp).sum(-1)


def cases(short: bool) -> Iterator[Case]:
    rows, vocab = (64, 32000) if short else (1024, 128256)
    for dtype in (torch.float32, torch.bfloat16):
        name = f"{rows}x{vocab} {str(dtype)[6:]}"
        torch.manual_seed(0)
        logits = (torch.randn(rows, vocab) * 3).to(dtype)
        labels = torch.randint(0, vocab, (rows,))
        few, few_labels = logits[:CHECKED], labels[:CHECKED]
        bytes_ = logits.nbytes

        def exact(x: Tensor = few, y: Tensor = few_labels) -> Tensor:
            return torch.log_softmax(x.double(), -1).gather(-1, y.unsqueeze(-1)).squeeze(-1)

        def variant(f, x=logits, y=labels, a=few, b=few_labels) -> Variant:
            return Variant(lambda: f(x, y), lambda: f(a, b))

        forward = {
            OURS: variant(lambda x, y: fastrlhf.logprobs(x, y).logprobs),
            "torch eager": variant(plain),
            "torch.compile": variant(compiled(plain)),
        }
        trl = peers.trl("selective_log_softmax")
        verl = peers.verl_functional("logprobs_from_logits_v2")
        if trl:
            forward["trl selective_log_softmax"] = variant(trl)
        if verl:
            forward["verl logprobs_from_logits_v2"] = variant(verl)
        yield Case("logprobs", f"forward {name}", forward, bytes_, exact)

        both = {
            OURS: Variant(lambda x=logits, y=labels: fastrlhf.logprobs(x, y, entropy=True)),
            "torch.compile": Variant(lambda x=logits, y=labels, f=compiled(plain_entropy): f(x, y)),
        }
        trl_entropy = peers.trl("entropy_from_logits")
        if trl and trl_entropy:
            both["trl, both functions"] = Variant(lambda x=logits, y=labels: (trl(x, y), trl_entropy(x)))
        verl_entropy = peers.verl_functional("entropy_from_logits_with_chunking")
        if verl and verl_entropy:
            both["verl, both functions"] = Variant(lambda x=logits, y=labels: (verl(x, y), verl_entropy(x)))
        yield Case("logprobs", f"forward + entropy {name}", both, bytes_)

        def with_gradient(f, x=logits, y=labels) -> Variant:
            leaf = x.detach().requires_grad_()
            upstream = torch.randn(x.shape[0])

            def run() -> Tensor:
                out = f(leaf, y)
                return torch.autograd.grad(out, leaf, upstream.to(out.dtype))[0]

            def value() -> Tensor:
                small = x[:CHECKED].detach().clone().requires_grad_()
                out = f(small, y[:CHECKED])
                out.backward(upstream[:CHECKED].to(out.dtype))
                return small.grad

            return Variant(run, value)

        step = {
            OURS: with_gradient(lambda x, y: fastrlhf.logprobs(x, y).logprobs),
            "torch eager": with_gradient(plain),
            "torch.compile": with_gradient(compiled(plain)),
        }
        if trl:
            step["trl selective_log_softmax"] = with_gradient(trl)
        yield Case("logprobs", f"forward + backward {name}", step, 3 * bytes_, writes=True)
