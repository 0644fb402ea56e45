"""Masked whitening. Floor: x and mask in twice (the statistics come first), the result out."""

from __future__ import annotations

from collections.abc import Iterator

import fastrlhf
import torch
from fastrlhf.kernels.masked_stats import reference

from . import peers
from .harness import OURS, Case, Variant, compiled


def cases(short: bool) -> Iterator[Case]:
    n = 16384 if short else 4 * 2**20
    torch.manual_seed(0)
    x, mask = torch.randn(64, n // 64), torch.rand(64, n // 64) < 0.7
    weights = mask.float()

    def whiten(x, mask):
        return reference.whiten(x, mask)

    variants = {
        OURS: Variant(lambda: fastrlhf.whiten(x, mask), lambda: fastrlhf.whiten(x, mask)),
        "torch eager": Variant(lambda: whiten(x, mask), lambda: whiten(x, mask)),
        "torch.compile": Variant(lambda f=compiled(whiten): f(x, mask)),
    }
    verl = peers.verl_functional("masked_whiten")
    if verl:
        variants["verl masked_whiten"] = Variant(lambda: verl(x, weights))
    yield Case(
        "whiten",
        f"{n} elements",
        variants,
        3 * x.nbytes + 2 * mask.nbytes,
        lambda: reference.whiten(x.double(), mask),
        writes=True,
    )
