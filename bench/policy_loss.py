"""The policy loss with gradient and statistics. Floor: log-probs, old ones, advantages and mask in, the gradient out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import fastrlhf
import torch
from torch import Tensor

from . import peers
from .harness import OURS, Case, Variant, compiled


def plain(lp: Tensor, old: Tensor, A: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same loss and the same statistics in PyTorch."""
    m, n = mask.float(), mask.sum()
    d = lp - old
    r = d.exp()
    free, held = A * r, A * r.clamp(0.8, 1.2)
    loss = (-torch.minimum(free, held) * m).sum() / n
    clipped = held < free
    stats = torch.stack([
        (m * (clipped & (A < 0))).sum() / n, (m * (clipped & (A > 0))).sum() / n, (m * r).sum() / n,
        r.masked_fill(~mask, torch.inf).amin(), r.masked_fill(~mask, -torch.inf).amax(), (-d * m).sum() / n,
        ((r - 1 - d) * m).sum() / n, n.float(),
    ])  # fmt: skip
    return loss, stats.detach()


def cases(short: bool) -> Iterator[Case]:
    B, T = (16, 512) if short else (256, 4096)
    torch.manual_seed(0)
    old = -torch.rand(B, T)
    lp = old + torch.randn(B, T) * 0.3
    A, mask = torch.randn(B, T), torch.rand(B, T) < 0.8

    def step(f: Callable[..., Any]) -> Variant:
        leaf = lp.clone().requires_grad_()

        def run() -> Tensor:
            return torch.autograd.grad(f(leaf, old, A, mask)[0], leaf)[0]

        return Variant(run, run)

    def exact() -> Tensor:
        leaf = lp.double().requires_grad_()
        plain(leaf, old.double(), A.double(), mask)[0].backward()
        return leaf.grad

    variants = {OURS: step(fastrlhf.policy_loss), "torch eager": step(plain), "torch.compile": step(compiled(plain))}
    verl, config = peers.verl_algorithm("compute_policy_loss_vanilla"), peers.find("verl.workers.config", "FSDPActorConfig")
    if verl and config:
        settings = config(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
        weights = mask.float()
        variants["verl compute_policy_loss_vanilla"] = step(lambda x, o, a, m: verl(o, x, a, weights, "token-mean", settings))
    yield Case(
        "policy_loss", f"{B * T} tokens, forward + backward + stats", variants, 4 * lp.nbytes + mask.nbytes, exact, writes=True
    )

    old_values, returns = torch.randn(B, T), torch.randn(B, T)
    values = {
        OURS: Variant(_value_step(lambda v: fastrlhf.value_loss(v, old_values, returns, mask).loss, old_values)),
        "torch eager": Variant(_value_step(lambda v: plain_value(v, old_values, returns, mask), old_values)),
        "torch.compile": Variant(_value_step(lambda v, f=compiled(plain_value): f(v, old_values, returns, mask), old_values)),
    }
    value = peers.verl_algorithm("compute_value_loss")
    if value:
        weights = mask.float()
        values["verl compute_value_loss"] = Variant(
            _value_step(lambda v: value(v, returns, old_values, weights, 0.2)[0], old_values)
        )
    yield Case("value_loss", f"{B * T} tokens, forward + backward + stats", values, 4 * lp.nbytes + mask.nbytes, writes=True)


def plain_value(v: Tensor, old: Tensor, r: Tensor, mask: Tensor) -> Tensor:
    held = old + (v - old).clamp(-0.2, 0.2)
    return (0.5 * torch.maximum((v - r) ** 2, (held - r) ** 2) * mask).sum() / mask.sum()


def _value_step(f: Callable[[Tensor], Tensor], like: Tensor) -> Callable[[], Tensor]:
    leaf = like.clone().add_(0.1).requires_grad_()

    def run() -> Tensor:
        return torch.autograd.grad(f(leaf), leaf)[0]

    return run
