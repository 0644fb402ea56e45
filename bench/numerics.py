"""The error table of docs/numerics.md: python -m bench.numerics. Largest absolute error of log-probs and entropy against
float64 of the same inputs."""

from __future__ import annotations

from collections.abc import Callable

import fastrlhf
import torch
from torch import Tensor

from . import peers
from .harness import quiet

ROWS, VOCAB = 256, 50257


def logits_of(kind: str, dtype: torch.dtype) -> Tensor:
    x = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(0))
    if kind == "peaked":
        x = x * 3
        x[:, 0] += 25
    elif kind == "shifted":
        x = x * 3 + 1e4
    elif kind == "uniform":
        x = x * 0 + 0.5
    elif kind == "masked":
        x = x * 5
        x[:, 1:40000] = -torch.inf
    else:
        x = x * 3
    return x.to(dtype)


def softmax_in(dtype: torch.dtype | None) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def both(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        lp = torch.log_softmax(x if dtype is None else x.to(dtype), -1)
        p = lp.exp()
        return lp.gather(-1, y.unsqueeze(-1)).squeeze(-1), -torch.where(p > 0, p * lp, torch.zeros_like(p)).sum(-1)

    return both


def main() -> None:
    candidates: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
        "fastrlhf": lambda x, y: fastrlhf.logprobs(x, y, entropy=True)[:2],
        "torch, float32": softmax_in(torch.float32),
        "torch, input dtype": softmax_in(None),
    }
    trl, trl_entropy = peers.trl("selective_log_softmax"), peers.trl("entropy_from_logits")
    if trl and trl_entropy:
        candidates["TRL"] = lambda x, y: (trl(x, y), trl_entropy(x))
    verl, verl_entropy = peers.verl_functional("logprobs_from_logits_v2"), peers.verl_functional("entropy_from_logits")
    if verl and verl_entropy:
        candidates["verl"] = lambda x, y: (verl(x, y), verl_entropy(x))
    names = list(candidates)
    print("| logits | dtype | of | " + " | ".join(names) + " |\n|---|---|---|" + "---|" * len(names))
    labels = torch.cat([torch.zeros(ROWS // 2, dtype=torch.long), torch.arange(40000, 40000 + ROWS // 2)])
    exact = softmax_in(torch.float64)
    for kind in ("normal", "peaked", "shifted", "uniform", "masked"):
        for dtype in (torch.float32, torch.bfloat16):
            x = logits_of(kind, dtype)
            want = exact(x, labels)
            errors = []
            for f in candidates.values():
                errors.append([float((a.double() - b).abs().max()) for a, b in zip(f(x, labels), want, strict=True)])
            for i, of in enumerate(("log-prob", "entropy")):
                print(f"| {kind} | {str(dtype)[6:]} | {of} | " + " | ".join(f"{e[i]:.1e}" for e in errors) + " |")


if __name__ == "__main__":
    with quiet():
        main()
