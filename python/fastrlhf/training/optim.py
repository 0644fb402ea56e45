"""AdamW with a schedule, gradients clipped by their global norm. What a step needs to be repeated is in its state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import option
from ..errors import UserError
from .state import load_into, load_optimizer, optimizer_tensors


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that take gradients, by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


class NotFinite(UserError, ArithmeticError):
    """A loss or gradient that is NaN or infinite; no weight was changed by it."""


@dataclass
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019). Weight decay leaves out norms and biases."""

    lr: float = option(1e-6, "Peak learning rate.", low=0)
    betas: list[float] = option([0.9, 0.95], "Decay of the two moments.", low=0, high=1)
    eps: float = option(1e-8, "Added to the root of the second moment.", low=0)
    weight_decay: float = option(0.0, "Decoupled weight decay, of matrices only.", low=0)
    grad_clip: float | None = option(1.0, "Largest global norm of a gradient; null does not clip.", low=0)
    schedule: str = option("constant", "After the warm-up.", choices=("constant", "linear", "cosine"))
    warmup_steps: int = option(0, "Optimizer steps over which the learning rate rises from 0.", low=0)
    min_lr_ratio: float = option(0.1, "Where a falling schedule ends, as a share of lr.", low=0, high=1)


class Optimizer:
    """One model's optimizer.

    Args:
        parameters: those that learn, by name.
        total_steps: optimizer steps over which the schedule runs.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, total_steps: int) -> None:
        self.parameters, self.config, self.total_steps = dict(parameters), config, max(total_steps, 1)
        # Where weights are bfloat16 or float16 the steps are taken on float32 copies: at RLHF's learning rates most of
        # them would round away.
        self.masters = {n: nn.Parameter(p.detach().float()) for n, p in self.parameters.items() if p.dtype != torch.float32}
        learning = self.parameters | self.masters
        matrices = {n: p for n, p in learning.items() if p.dim() >= 2}
        rest = {n: p for n, p in learning.items() if p.dim() < 2}
        groups = [
            {"params": list(members.values()), "weight_decay": decay}
            for members, decay in ((matrices, config.weight_decay), (rest, 0.0))
            if members
        ]
        self.adamw = torch.optim.AdamW(
            groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True
        )
        self.steps = 0

    @property
    def lr(self) -> float:
        """Of the next step."""
        c, step = self.config, self.steps
        if step < c.warmup_steps:
            return c.lr * (step + 1) / c.warmup_steps
        if c.schedule == "constant":
            return c.lr
        done = min((step - c.warmup_steps) / max(self.total_steps - c.warmup_steps, 1), 1.0)
        share = 1 - done if c.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return c.lr * (c.min_lr_ratio + (1 - c.min_lr_ratio) * share)

    def step(self, what: str, loss: Tensor | None = None) -> dict[str, float]:
        """Clip, move the weights, forget the gradients. Returns the gradient's norm and the learning rate.

        Raises:
            NotFinite: the loss or the gradient is not finite; the weights are as they were.
        """
        limit = math.inf if self.config.grad_clip is None else self.config.grad_clip
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        lr = self.lr
        finite = bool(torch.isfinite(norm)) and (loss is None or bool(torch.isfinite(loss)))
        if not finite:
            self._forget()
            value = "" if loss is None else f" the loss is {float(loss)},"
            raise NotFinite(f"{what}:{value} the gradient's norm {float(norm)}; no weight was changed")
        for group in self.adamw.param_groups:
            group["lr"] = lr
        with torch.no_grad():
            for name, master in self.masters.items():
                grad = self.parameters[name].grad
                master.grad = None if grad is None else grad.float()
            self.adamw.step()
            for name, master in self.masters.items():
                self.parameters[name].copy_(master)
        self._forget()
        self.steps += 1
        return {"grad_norm": float(norm), "lr": lr}

    def _forget(self) -> None:
        for p in (*self.parameters.values(), *self.masters.values()):
            p.grad = None

    def save(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, state = optimizer_tensors(self.adamw, self.parameters | self.masters)
        masters = {f"{name}.master": p.detach() for name, p in self.masters.items()}
        return tensors | masters, {"steps": self.steps, "adamw": state}

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        masters = {n.removesuffix(".master"): t for n, t in tensors.items() if n.endswith(".master")}
        load_into(dict(self.masters), masters, "optimizer's float32 weights")
        load_optimizer(self.adamw, self.parameters | self.masters, tensors, state["adamw"])
        self.steps = int(state["steps"])
