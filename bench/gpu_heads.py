"""The fused head on a GPU: rows x vocabulary x width. The floor is that of the matrix products, at the bf16 rate that a square
product reaches in the same run; the bare product of the same shape is a variant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import fastrlhf
import torch
from torch import Tensor

from . import linear_head, logprobs, peers, policy_loss
from .gpu import Inputs, Rotation
from .harness import OURS, Case, Variant
from .linear_head import Head

if TYPE_CHECKING:
    from .gpu_cases import Setting

CHECKED = 16
STRIP = 8192  # columns of the vocabulary
CHUNK = 1792  # rows: 7 times what two blocks take
KERNEL = f"{OURS} cuda, the Hopper kernel"
Step = Callable[[Tensor, Tensor, Tensor], Any]


def shapes(setting: Setting) -> list[tuple[int, int, int]]:
    return [(24, 1000, 64)] if setting.short else [(8192, 128256, 4096), (8192, 151936, 1024), (128, 128256, 4096)]


def inputs_of(setting: Setting, rows: int, vocab: int, width: int) -> Rotation:
    """Logits with a standard deviation of 3, or of 1 where the checks should see more than their rounding to bfloat16."""
    spread = 1 if setting.short else 3

    def make() -> Inputs:
        hidden = setting.randn(rows, width, dtype=torch.bfloat16).mul_(spread / width**0.5)
        return (
            hidden,
            setting.randn(vocab, width, dtype=torch.bfloat16),
            torch.randint(0, vocab, (rows,), device=setting.device),
        )

    return Rotation(make)


def head_of(hidden: Tensor, weight: Tensor, labels: Tensor) -> Head:
    return Head(hidden, weight, labels, allocate=linear_head.unfilled)


def on_hopper(setting: Setting) -> bool:
    return setting.device.type == "cuda" and linear_head.available()


def ours(setting: Setting, op: str, make: Callable[[str], Variant]) -> dict[str, Variant]:
    return {f"{OURS} {name}": make(name) for name in setting.backends(op)} if hasattr(fastrlhf, op) else {}


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    return logprobs.plain_entropy(hidden @ weight.T, labels)


def forward(setting: Setting) -> Iterator[Case]:
    """Log-probs and entropies from hidden states."""
    for rows, vocab, width in shapes(setting):
        inputs = inputs_of(setting, rows, vocab, width)
        few = (inputs.first[0][:CHECKED], inputs.first[1], inputs.first[2][:CHECKED])

        def variant(f: Step) -> Variant:
            return Variant(lambda: f(*inputs.take()), lambda: torch.stack([t.double() for t in f(*few)[:2]]))

        def op(name: str) -> Variant:
            return variant(lambda *a: fastrlhf.linear_logprobs(*a, entropy=True, backend=name))

        found = {}
        if on_hopper(setting):
            found[KERNEL] = variant(lambda *a: head_of(*a).statistics())
        found |= ours(setting, "linear_logprobs", op)
        found |= {"torch matmul alone": Variant(lambda: _product(*inputs.take())), "torch eager": variant(eager)}
        if verl := peers.verl_linear_cross_entropy():
            found["verl linear_cross_entropy"] = variant(lambda *a: _verl(verl, *a))
        yield Case(
            "linear_logprobs", f"forward {rows}x{vocab}x{width} bfloat16", found,
            floor_operations=2.0 * rows * vocab * width, oracle=lambda: torch.stack(_exact(*few)),
        )  # fmt: skip


def _product(hidden: Tensor, weight: Tensor, _labels: Tensor) -> Tensor:
    return hidden @ weight.T


def _verl(f: Callable[..., Any], hidden: Tensor, weight: Tensor, labels: Tensor) -> Any:
    return f(hidden, weight, labels, 1.0, "none")


def _exact(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    lp = torch.log_softmax(hidden.double() @ weight.double().T, -1)
    return lp.gather(-1, labels[:, None])[:, 0], -(lp.exp() * lp).sum(-1)


def gradients(setting: Setting) -> Iterator[Case]:
    """The kernel that computes a strip's d logits again, over all strips, alone (2NVH) and with the two products that consume
    them (6NVH); and forward and gradients from one product of the logits (6NVH)."""
    if not on_hopper(setting) and not setting.short:
        return
    for rows, vocab, width in shapes(setting)[:1]:
        inputs = inputs_of(setting, rows, vocab, width)
        grad = setting.randn(rows)
        strips = [(start, min(start + STRIP, vocab)) for start in range(0, vocab, STRIP)]
        found: dict[str, Variant] = {}
        products = 2.0 * rows * vocab * width
        if on_hopper(setting):
            statistics = head_of(*inputs.first).statistics()
            for dtype in (torch.bfloat16, torch.float32):
                room = torch.empty(rows, STRIP, dtype=dtype, device=setting.device)

                def alone(room: Tensor = room) -> None:
                    whole = head_of(*inputs.take())
                    for start, end in strips:
                        whole.columns(start, end).gradient(statistics, (grad, None, None), out=room)

                found[f"{KERNEL}, d logits in {str(dtype)[6:]}"] = Variant(alone)
            room = torch.empty(rows, STRIP, dtype=torch.bfloat16, device=setting.device)

            def backward() -> tuple[Tensor, Tensor]:
                return _backward(head_of(*inputs.take()), statistics, grad, strips, room)

            found[f"{KERNEL}, and both products"] = Variant(backward, floor_operations=3 * products)
            found[f"{KERNEL}, forward and gradients"] = Variant(
                lambda: _one_sweep(head_of(*inputs.take()), grad), floor_operations=3 * products
            )
        found["torch matmul alone"] = Variant(lambda: _product(*inputs.take()))
        yield Case("linear_logprobs", f"d logits {rows}x{vocab}x{width} bfloat16", found, floor_operations=products)


def _backward(head: Head, of: linear_head.Statistics, grad: Tensor, strips: list[tuple[int, int]], room: Tensor) -> Any:
    """Gradients of hidden states and weights, in float32."""
    d_hidden = torch.zeros_like(head.hidden, dtype=torch.float32)
    d_weight = torch.empty_like(head.weight, dtype=torch.float32)
    for start, end in strips:
        strip = head.columns(start, end)
        d = strip.gradient(of, (grad, None, None), out=room)
        d_hidden += torch.mm(d, strip.weight, out_dtype=torch.float32)
        d_weight[start:end] = torch.mm(d.T, head.hidden, out_dtype=torch.float32)
    return d_hidden, d_weight


def _one_sweep(head: Head, grad: Tensor) -> Any:
    """Forward and gradients with three products: rows at a time, so that their exponentials stay under half a gigabyte."""
    d_hidden = torch.empty_like(head.hidden)
    d_weight = torch.zeros_like(head.weight, dtype=torch.float32)
    for start in range(0, len(head.hidden), CHUNK):
        rows = slice(start, start + CHUNK)
        some = head.rows(rows)
        partials, kept, references = some.exponentials()
        d = some.gradient_in_place(some.combined(partials), (grad[rows], None, None), kept, references)
        torch.mm(d, head.weight, out=d_hidden[rows])
        torch.addmm(d_weight, d.T, some.hidden, out_dtype=torch.float32, out=d_weight)
        del kept, d
    return d_hidden, d_weight


def losses(setting: Setting) -> Iterator[Case]:
    """From hidden states to the policy loss and its gradients on hidden states and weights. Floor: 6NVH."""
    for rows, vocab, width in shapes(setting)[:1]:
        inputs = inputs_of(setting, rows, vocab, width)
        old, advantages, mask = -3 - 5 * setting.randn(rows).abs(), setting.randn(rows), setting.mask(rows)

        def step(f: Callable[..., Tensor], hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
            leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
            return torch.autograd.grad(f(*leaves, labels), leaves)

        def variant(f: Callable[..., Tensor]) -> Variant:
            return Variant(lambda: step(f, *inputs.take()))

        def of_logprobs(logprobs_: Tensor) -> Tensor:
            return policy_loss.plain(logprobs_, old, advantages, mask)[0]

        def op(name: str, **options: Any) -> Variant:
            fused = fastrlhf.linear_policy_loss
            return variant(lambda *a: fused(*a, old, advantages, mask, backend=name, **options).loss)

        # d logits as float32, which is the default, and rounded as the other variants round them
        found = ours(setting, "linear_policy_loss", op)
        rounded = {"workspace_dtype": torch.bfloat16}
        found |= {f"{n} rounded": op(n.removeprefix(f"{OURS} "), **rounded) for n in list(found)}
        found["torch eager"] = variant(lambda h, w, y: of_logprobs(logprobs.plain(h @ w.T, y)))
        if verl := peers.verl_linear_cross_entropy():
            found["verl linear_cross_entropy"] = variant(lambda *a: of_logprobs(_verl(verl, *a)[0]))
        name = f"forward + backward {rows}x{vocab}x{width} bfloat16"
        yield Case("linear_policy_loss", name, found, floor_operations=6.0 * rows * vocab * width)
