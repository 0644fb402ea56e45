"""Sampling: floor one read of the logits."""

from __future__ import annotations

from collections.abc import Iterator

import fastrlhf
import torch
from torch import Tensor

from .harness import OURS, Case, Variant


def plain(logits: Tensor) -> tuple[Tensor, Tensor]:
    lp = torch.log_softmax(logits, -1)
    token = torch.multinomial(lp.exp(), 1)
    return token, lp.gather(-1, token)


def plain_top_p(logits: Tensor, p: float) -> tuple[Tensor, Tensor]:
    ordered, index = logits.sort(-1, descending=True)
    probabilities = torch.softmax(ordered, -1)
    cut = probabilities.cumsum(-1) - probabilities >= p
    lp = torch.log_softmax(ordered.masked_fill(cut, -torch.inf), -1)
    token = torch.multinomial(lp.exp(), 1)
    return index.gather(-1, token), lp.gather(-1, token)


def cases(short: bool) -> Iterator[Case]:
    rows, vocab = (4, 32000) if short else (64, 128256)
    torch.manual_seed(0)
    logits = torch.randn(rows, vocab) * 3
    yield Case("sample", f"{rows}x{vocab}", {
        OURS: Variant(lambda: fastrlhf.sample(logits, seed=0)), "torch eager": Variant(lambda: plain(logits)),
    }, logits.nbytes)  # fmt: skip
    yield Case("sample", f"{rows}x{vocab}, top_p 0.9", {
        OURS: Variant(lambda: fastrlhf.sample(logits, seed=0, top_p=0.9)),
        "torch eager": Variant(lambda: plain_top_p(logits, 0.9)),
    }, logits.nbytes)  # fmt: skip
