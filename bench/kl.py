"""Full-vocabulary KL: one read of each row's two distributions."""

from __future__ import annotations

from collections.abc import Iterator

import fastrlhf
import torch
import torch.nn.functional as F
from torch import Tensor

from .harness import OURS, Case, Variant, compiled


def plain(x: Tensor, y: Tensor) -> Tensor:
    return F.kl_div(torch.log_softmax(x.float(), -1), torch.log_softmax(y.float(), -1), log_target=True, reduction="none").sum(
        -1
    )


def cases(short: bool) -> Iterator[Case]:
    rows, vocab = (64, 32000) if short else (512, 128256)
    torch.manual_seed(0)
    x = torch.randn(rows, vocab) * 3
    y = x + torch.randn(rows, vocab)
    yield Case(
        "kl_full",
        f"forward {rows}x{vocab} float32",
        {
            OURS: Variant(lambda: fastrlhf.kl_full(x, y), lambda: fastrlhf.kl_full(x[:32], y[:32])),
            "torch eager": Variant(lambda: plain(x, y), lambda: plain(x[:32], y[:32])),
            "torch.compile": Variant(lambda f=compiled(plain): f(x, y)),
        },
        x.nbytes + y.nbytes,
        lambda: F.kl_div(
            torch.log_softmax(x[:32].double(), -1), torch.log_softmax(y[:32].double(), -1), log_target=True, reduction="none"
        ).sum(-1),
    )
