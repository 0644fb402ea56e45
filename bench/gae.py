"""Advantages. Floor: rewards, values and mask in, advantages and returns out."""

from __future__ import annotations

from collections.abc import Iterator

import fastrlhf
import torch
from fastrlhf.kernels.gae import reference

from . import peers
from .harness import OURS, Case, Variant


def cases(short: bool) -> Iterator[Case]:
    B, T = (16, 512) if short else (256, 16384)
    torch.manual_seed(0)
    r, v, mask = torch.randn(B, T), torch.randn(B, T), torch.rand(B, T) < 0.9
    weights = mask.float()
    bytes_ = 4 * r.nbytes + mask.nbytes
    variants = {
        OURS: Variant(lambda: fastrlhf.gae(r, v, mask, gamma=0.99), lambda: fastrlhf.gae(r[:4], v[:4], mask[:4], gamma=0.99)[0])
    }
    packed = [x.reshape(-1) for x in (r, v, mask)]
    cu = torch.arange(0, B * T + 1, T)
    variants["fastrlhf packed"] = Variant(lambda: fastrlhf.gae(*packed, cu_seqlens=cu, gamma=0.99))
    whitened = {OURS: Variant(lambda: fastrlhf.gae(r, v, mask, gamma=0.99, whiten=True))}
    verl = peers.verl_algorithm("compute_gae_advantage_return")
    if verl:
        variants["verl, and its whitening"] = Variant(lambda: verl(r, v, weights, 0.99, 0.95))
        whitened["verl compute_gae_advantage_return"] = Variant(lambda: verl(r, v, weights, 0.99, 0.95))
    variants["torch loop"] = Variant(
        lambda: reference.gae(r, v, mask, gamma=0.99), lambda: reference.gae(r[:4], v[:4], mask[:4], gamma=0.99)[0]
    )
    yield Case(
        "gae", f"{B}x{T}, interior masks", variants, bytes_,
        lambda: reference.gae(r[:4].double(), v[:4].double(), mask[:4], gamma=0.99)[0], writes=True,
    )  # fmt: skip
    yield Case("gae", f"{B}x{T}, whitened", whitened, bytes_, writes=True)
    lp, ref, scores = torch.randn(B, T), torch.randn(B, T), torch.randn(B)

    def separate() -> None:
        rewards, _ = fastrlhf.shape_rewards(scores, lp, ref, mask, kl_coef=0.1)
        fastrlhf.gae(rewards, v, mask, whiten=True)

    yield Case(
        "experience", f"{B}x{T}",
        {
            OURS: Variant(lambda: fastrlhf.experience(scores, lp, ref, v, mask, kl_coef=0.1, whiten=True)),
            "fastrlhf, op by op": Variant(separate),
        },
        7 * r.nbytes + mask.nbytes, writes=True,
    )  # fmt: skip
