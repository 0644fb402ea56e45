"""AdamW with a schedule, gradients clipped by their global norm. What a step needs to be repeated is in its state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import option
from ..errors import UserError
from ..parallel import ParallelGroups
from ..parallel.collectives import summed
from ..parallel.sharding import placed, sharding_of
from .shards import Slice, add_partial, gather, scalar, scatter
from .state import load_into, load_optimizer, optimizer_tensors


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that take gradients, by their names in the whole model: of a tied embedding that two stages of a
    pipeline hold, both copies have the embedding's."""
    return {
        n.replace("lm_head", "embed_tokens") if sharding_of(p).shared else n: p
        for n, p in model.named_parameters()
        if p.requires_grad
    }


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

    Gradients of parameters that are not float32 are added up in float32 over the micro-batches of a step, and the steps are
    taken on float32 copies: at RLHF's learning rates most of them would round away. Across processes gradients are summed
    over dp, each dp rank steps its rows (`training.shards`), and the norm that clips is that of the whole model's gradient.

    Args:
        parameters: those that learn, by name.
        total_steps: optimizer steps over which the schedule runs.
        groups: where the parameters' shards are.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, total_steps: int,
        groups: ParallelGroups | None = None,
    ) -> None:  # fmt: skip
        self.parameters, self.config, self.total_steps = dict(parameters), config, max(total_steps, 1)
        self.groups = groups or ParallelGroups()
        self.slices = {n: Slice(p, self.groups) for n, p in self.parameters.items()}
        self.masters = {n: s.weights for n, s in self.slices.items() if self.parameters[n].dtype != torch.float32}
        self._added: dict[str, Tensor] = {}
        for name in self.masters:
            self.parameters[name].register_post_accumulate_grad_hook(self._adder(name))
        self.learning = {n: s.weights for n, s in self.slices.items() if not s.empty}
        matrices = {n: p for n, p in self.learning.items() if p.dim() >= 2}
        rest = {n: p for n, p in self.learning.items() if p.dim() < 2}
        groups_ = [
            {"params": list(members.values()), "weight_decay": decay}
            for members, decay in ((matrices, config.weight_decay), (rest, 0.0))
            if members
        ]
        self.adamw = torch.optim.AdamW(
            groups_, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True
        )
        self.steps = 0

    def _adder(self, name: str) -> Callable[[Tensor], None]:
        def add(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if name in self._added:
                self._added[name] += parameter.grad
            else:
                self._added[name] = parameter.grad.float()
            parameter.grad = None

        return add

    def gradient(self, name: str) -> Tensor | None:
        """A parameter's gradient so far, in this process."""
        grad = self.parameters[name].grad
        if name not in self.masters:
            return grad
        added = self._added.get(name)
        if grad is None:
            return added
        return grad.float() if added is None else added + grad

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

        Collective over all processes. `loss` is the same in all of them.

        Raises:
            NotFinite: the loss or the gradient is not finite; the weights are as they were.
        """
        grads = self._reduced()
        norm = self._norm(grads)
        lr = self.lr
        finite = math.isfinite(norm) and (loss is None or bool(torch.isfinite(loss)))
        if not finite:
            self._forget()
            value = "" if loss is None else f" the loss is {float(loss)},"
            raise NotFinite(f"{what}:{value} the gradient's norm {norm}; no weight was changed")
        scale = 1.0 if self.config.grad_clip is None else min(1.0, self.config.grad_clip / (norm + 1e-6))
        if scale < 1:
            torch._foreach_mul_(list(grads.values()), scale)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        for name, grad in grads.items():
            if name in self.learning:
                self.learning[name].grad = grad
        self.adamw.step()
        gather(list(self.slices.values()), self.groups.dp)
        self._forget()
        self.steps += 1
        return {"grad_norm": norm, "lr": lr}

    def _reduced(self) -> dict[str, Tensor]:
        """The gradient of each slice's rows, summed over whatever processes hold parts of it."""
        groups = self.groups
        grads: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            grad = self.gradient(name)
            if grad is None and groups.world.size > 1:
                grad = torch.zeros_like(parameter, dtype=torch.float32)
            if grad is not None:
                grads[name] = grad.contiguous()
        add_partial([g for n, g in grads.items() if self.slices[n].sharding.partial], groups.tp)
        add_partial([g for n, g in grads.items() if self.slices[n].sharding.tied], groups.ends)
        self._added = {}
        for p in self.parameters.values():
            p.grad = None
        return dict(zip(grads, scatter([self.slices[n] for n in grads], list(grads.values()), groups.dp), strict=True))

    def _norm(self, grads: Mapping[str, Tensor]) -> float:
        """Of the whole model's gradient: every element counted once."""
        counted = [g for n, g in grads.items() if self.slices[n].counts and g.numel()]
        norms = torch.stack(torch._foreach_norm(counted)).double() if counted else torch.zeros(1, dtype=torch.float64)
        device = next(iter(self.parameters.values())).device
        return math.sqrt(summed((norms**2).sum().to(device), self.groups.world))

    def _forget(self) -> None:
        self._added = {}
        for p in (*self.parameters.values(), *self.learning.values()):
            p.grad = None

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Moments for every weight, which a checkpoint is then loaded into; none where it was saved before the first step,
        as in a critic's warm-up, and has none.

        Args:
            state: the JSON that `save` gave.
        """
        if not int(state["steps"]):
            self.adamw.state.clear()
            return
        for p in self.learning.values():
            if not self.adamw.state[p]:
                zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                self.adamw.state[p] = {"step": torch.zeros((), device=p.device), **zeros}

    def save(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON. Across processes each tensor says where it lies, and the JSON is the same for all layouts."""
        if self.groups.world.size > 1:
            return self._save_slices(), {"steps": self.steps}
        tensors, state = optimizer_tensors(self.adamw, self.parameters | self.masters)
        masters = {f"{name}.master": p.detach() for name, p in self.masters.items()}
        return tensors | masters, {"steps": self.steps, "adamw": state}

    def _save_slices(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, p in self.learning.items():
            s = self.slices[name]
            where = s.placement()
            for key, value in self.adamw.state[p].items():
                tensors[f"{name}.{key}"] = placed(value, where) if value.dim() else scalar(value, self.groups, s.counts)
            if name in self.masters:
                tensors[f"{name}.master"] = placed(p, where)
        return tensors

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """What `save` gave, of one process; of several, `training.sharded` has filled the tensors in place already."""
        if "adamw" in state and self.groups.world.size == 1:
            masters = {n.removesuffix(".master"): t for n, t in tensors.items() if n.endswith(".master")}
            load_into({n: p.data for n, p in self.masters.items()}, masters, "optimizer's float32 weights")
            load_optimizer(self.adamw, self.parameters | self.masters, tensors, state["adamw"])
        self.steps = int(state["steps"])
        if not self.steps:
            self.adamw.state.clear()
