"""What is measured on a GPU: the cases that bench/bars.py has bars for come first. Logits look like a language model's:
normal with a few high peaks, and every other label is one of the peaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import fastrlhf
import torch
from fastrlhf.kernels.gae import reference as gae_reference
from fastrlhf.kernels.masked_stats import reference as stats_reference
from fastrlhf.ops import backend as backends
from torch import Tensor

from . import call_cost, gpu_heads, kl, logprobs, peers, policy_loss, sampling
from .gpu import Inputs, Rotation
from .harness import OURS, Case, Variant, compiled

CHECKED = 16  # rows compared with float64, from the first to the last; not by torch.compile, whose results are eager's


class Setting:
    """Where the cases run, how large they are, and which of our backends there are to compare."""

    def __init__(self, device: str | torch.device, short: bool = False, ours: tuple[str, ...] = ("cuda", "triton")) -> None:
        self.device, self.short, self.ours = torch.device(device), short, ours

    def backends(self, op: str) -> list[str]:
        having = {"cuda": backends.CUDA, "triton": backends.TRITON}
        return [name for name in self.ours if op in having.get(name, (op,))]

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype)

    def mask(self, *shape: int) -> Tensor:
        return torch.rand(*shape, device=self.device) < 0.8

    def logits(self, rows: int, vocab: int) -> Inputs:
        """bf16 logits and labels."""
        x = self.randn(rows, vocab, dtype=torch.bfloat16).mul_(3)
        peaks = torch.randint(0, vocab, (rows, 4), device=self.device)
        x.scatter_(1, peaks, (8 + 12 * torch.rand(rows, 4, device=self.device)).bfloat16())
        labels = torch.randint(0, vocab, (rows,), device=self.device)
        labels[::2] = peaks[::2, 0]
        return x, labels


def variants(setting: Setting, op: str, make: Callable[[str], Variant]) -> dict[str, Variant]:
    """One of ours for each backend."""
    return {f"{OURS} {name}": make(name) for name in setting.backends(op)}


def some_of(rows: Tensor) -> Tensor:
    """Indices of CHECKED rows, the first and the last among them: persistent grids come to them at different turns."""
    return torch.linspace(0, len(rows) - 1, CHECKED, device=rows.device).long()


def gradient(out: Tensor | tuple[Tensor, ...], upstream: Tensor | tuple[Tensor, ...] | None, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(out, leaf, upstream)[0]


# ------------------------------------------------------------------------------------------------------------------- log-probs


def logprobs_shapes(setting: Setting) -> list[tuple[int, int]]:
    return [(24, 1000)] if setting.short else [(8192, 128256), (4096, 151936)]


def scores(setting: Setting) -> Iterator[Case]:
    """Log-probs with entropy, no gradient. Floor: one read of the logits."""
    for rows, vocab in logprobs_shapes(setting):
        inputs = Rotation(lambda: setting.logits(rows, vocab))
        at = some_of(inputs.first[0])
        few = tuple(t[at] for t in inputs.first)

        def variant(f: Callable[[Tensor, Tensor], Any]) -> Variant:
            return Variant(lambda: f(*inputs.take()), lambda: torch.stack([t[at].double() for t in f(*inputs.first)[:2]]))

        def ours(name: str) -> Variant:
            return variant(lambda x, y: fastrlhf.logprobs(x, y, entropy=True, backend=name))

        found = variants(setting, "logprobs", ours)
        plain = compiled(logprobs.plain_entropy)
        found |= {"torch eager": variant(logprobs.plain_entropy), "torch.compile": Variant(lambda: plain(*inputs.take()))}
        trl, trl_entropy = peers.trl("selective_log_softmax"), peers.trl("entropy_from_logits")
        if trl and trl_entropy:
            found["TRL, both functions"] = variant(lambda x, y: (trl(x, y), trl_entropy(x)))
        verl, verl_entropy = peers.verl_functional("logprobs_from_logits"), peers.verl_functional("entropy_from_logits")
        if verl and verl_entropy:
            found["verl, both functions"] = variant(lambda x, y: (verl(x, y, inplace_backward=False), verl_entropy(x)))
        flash = peers.flash_attention_cross_entropy()
        if flash:
            found["flash-attention, no entropy"] = Variant(lambda: flash(*inputs.take()))
        liger = peers.liger_selective_log_softmax()
        if liger:
            found["Liger GRPO's log-softmax, no entropy"] = Variant(lambda: liger_scores(liger, *inputs.take()))
        yield Case(
            "logprobs", f"forward + entropy {rows}x{vocab} bfloat16", found, inputs.first[0].nbytes,
            lambda: torch.stack(_entropy64(*few)),
        )  # fmt: skip


def _logprobs64(x: Tensor, y: Tensor) -> Tensor:
    return torch.log_softmax(x.double(), -1).gather(-1, y[:, None])[:, 0]


def _entropy64(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    lp = torch.log_softmax(x.double(), -1)
    return _logprobs64(x, y), -(lp.exp() * lp).sum(-1)


def liger_scores(f: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
    """One sequence, whose last position it leaves out."""
    return f(x.unsqueeze(0), y.unsqueeze(0), 1.0)


def trained(setting: Setting) -> Iterator[Case]:
    """Log-probs with their gradient. Floor: two reads and a write, since the upstream gradient comes after the forward."""
    for rows, vocab in logprobs_shapes(setting):
        inputs = Rotation(lambda: setting.logits(rows, vocab))
        upstream = setting.randn(rows)
        at = some_of(upstream)
        few = tuple(t[at] for t in inputs.first)

        def step(f: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, g: Tensor = upstream) -> Tensor:
            leaf = x.detach().requires_grad_()
            out = f(leaf, y)
            return gradient(out, g.to(out.dtype), leaf)

        def variant(f: Callable[[Tensor, Tensor], Tensor]) -> Variant:
            return Variant(lambda: step(f, *inputs.take()), lambda: step(f, *inputs.first)[at])

        def ours(name: str) -> Variant:
            return variant(lambda x, y: fastrlhf.logprobs(x, y, backend=name).logprobs)

        found = variants(setting, "logprobs", ours)
        plain = compiled(logprobs.plain)
        found |= {"torch eager": variant(logprobs.plain), "torch.compile": Variant(lambda: step(plain, *inputs.take()))}
        trl, flash = peers.trl("selective_log_softmax"), peers.flash_attention_cross_entropy()
        if trl:
            found["TRL selective_log_softmax"] = variant(trl)
        if flash:
            found["flash-attention"] = variant(lambda x, y: -flash(x, y)[0])
        if peers.liger_cross_entropy():
            found["Liger, sum of the losses"] = liger_step(inputs)
        yield Case(
            "logprobs", f"forward + backward {rows}x{vocab} bfloat16", found, 3 * inputs.first[0].nbytes,
            lambda: step(_logprobs64, few[0].double(), few[1], upstream[at]), writes=True,
        )  # fmt: skip


def liger_step(inputs: Rotation) -> Variant:
    """On logits of its own: it writes over them, so that after the first call they are a gradient's."""
    f = peers.liger_cross_entropy()
    x, y = inputs.first[0].clone(), inputs.first[1]

    def run() -> Tensor:
        leaf = x.detach().requires_grad_()
        return gradient(f(leaf, y, reduction="sum"), None, leaf)

    return Variant(run)


def policy_of_logits(x: Tensor, y: Tensor, old: Tensor, A: Tensor, mask: Tensor) -> Tensor:
    return policy_loss.plain(logprobs.plain(x, y), old, A, mask)[0]


def losses_of_logits(setting: Setting) -> Iterator[Case]:
    """From logits to the policy loss's gradient on them. Floor: one read and a write, where loss and gradient are computed
    together; the same through `logprobs` reads twice."""
    for rows, vocab in logprobs_shapes(setting):

        def make() -> Inputs:
            x, y = setting.logits(rows, vocab)
            old = logprobs.plain(x, y) + 0.3 * setting.randn(rows)
            return x, y, old, setting.randn(rows), setting.mask(rows)

        inputs = Rotation(make)
        at = some_of(inputs.first[0])
        few = tuple(t[at] for t in inputs.first)

        def step(f: Callable[..., Tensor], x: Tensor, *rest: Tensor) -> Tensor:
            leaf = x.detach().requires_grad_()
            return gradient(f(leaf, *rest), None, leaf)

        def variant(f: Callable[..., Tensor], floor_bytes: float | None = None) -> Variant:
            return Variant(lambda: step(f, *inputs.take()), lambda: step(f, *inputs.first)[at], floor_bytes)

        def separate(name: str) -> Variant:
            def f(x: Tensor, y: Tensor, *rest: Tensor) -> Tensor:
                return fastrlhf.policy_loss(fastrlhf.logprobs(x, y, backend=name).logprobs, *rest, backend=name).loss

            return variant(f, 3 * inputs.first[0].nbytes)

        fused = fastrlhf.logits_policy_loss
        found = variants(
            setting, "logits_policy_loss", lambda name: variant(lambda *a: fused(*a, backend=name).loss)
        )  # fmt: skip
        found |= {f"{name}, op by op": v for name, v in variants(setting, "logprobs", separate).items()}
        plain = compiled(policy_of_logits)
        found |= {"torch eager": variant(policy_of_logits), "torch.compile": Variant(lambda: step(plain, *inputs.take()))}
        if peers.liger_cross_entropy():
            found["Liger, sum of the losses"] = liger_step(inputs)
        yield Case(
            "logits_policy_loss", f"forward + backward {rows}x{vocab} bfloat16", found, 2 * inputs.first[0].nbytes,
            lambda: step(_policy_of_logits64, few[0].double(), few[1], few[2].double(), few[3].double(), few[4])
            * (few[4].sum() / inputs.first[4].sum()), writes=True,
        )  # fmt: skip


def _policy_of_logits64(x: Tensor, y: Tensor, *rest: Tensor) -> Tensor:
    return policy_loss.plain(_logprobs64(x, y), *rest)[0]


def divergences(setting: Setting) -> Iterator[Case]:
    """Full-vocabulary KL. Floor: one read of each tensor."""
    rows, vocab = (24, 1000) if setting.short else (4096, 128256)

    def make() -> Inputs:
        x, _ = setting.logits(rows, vocab)
        return x, x + setting.randn(rows, vocab, dtype=torch.bfloat16)

    for direction in ("forward", "reverse"):
        inputs = Rotation(make)
        at = some_of(inputs.first[0])
        few = tuple(t[at] for t in inputs.first)

        def plain(x: Tensor, y: Tensor) -> Tensor:
            """P from x, Q from y: forward is KL(Q || P)."""
            return kl.plain(x, y) if direction == "forward" else kl.plain(y, x)

        def variant(f: Callable[[Tensor, Tensor], Tensor]) -> Variant:
            return Variant(lambda: f(*inputs.take()), lambda: f(*inputs.first)[at])

        def ours(name: str) -> Variant:
            return variant(lambda x, y: fastrlhf.kl_full(x, y, direction=direction, backend=name))

        found = variants(setting, "kl_full", ours)
        fast = compiled(plain)
        found |= {"torch eager": variant(plain), "torch.compile": Variant(lambda: fast(*inputs.take()))}

        def exact() -> Tensor:
            x, y = (torch.log_softmax(t.double(), -1) for t in few)
            p, q = (y, x) if direction == "forward" else (x, y)
            return (p.exp() * (p - q)).sum(-1)

        yield Case("kl_full", f"{direction} {rows}x{vocab} bfloat16", found, sum(t.nbytes for t in inputs.first), exact)


# -------------------------------------------------------------------------------------------------- advantages and small ops


def advantages(setting: Setting) -> Iterator[Case]:
    """Floor: rewards, values and mask in, advantages and returns out, 17 bytes a token."""
    shapes = [(6, 40)] if setting.short else [(512, 4096), (128, 16384), (1024, 16384)]
    for B, T in shapes:
        inputs = Rotation(lambda: (setting.randn(B, T), setting.randn(B, T), setting.mask(B, T)))
        few = tuple(t[:4] for t in inputs.first)

        def ours(name: str) -> Variant:
            def f(*a: Tensor) -> Tensor:
                return fastrlhf.gae(*a, gamma=0.99, backend=name)[0]

            return Variant(lambda: f(*inputs.take()), lambda: f(*few))

        found = variants(setting, "gae", ours)
        if B * T <= 2**21:  # a loop over the tokens: some launches for each
            found["torch loop"] = Variant(lambda: gae_reference.gae(*inputs.take(), gamma=0.99))
            verl = peers.verl_algorithm("compute_gae_advantage_return")
            if verl:
                found["verl, and its whitening"] = Variant(lambda: _verl_gae(verl, *inputs.take()))
        yield Case("gae", f"{B}x{T}", found, 17 * B * T, lambda: _gae64(*few), writes=True)

    total = 300 if setting.short else 2**21
    lengths = torch.randint(1, min(8192, total // 4), (total,), generator=torch.Generator().manual_seed(0))
    ends = lengths.cumsum(0)
    cu = torch.cat([torch.zeros(1, dtype=torch.long), ends[ends < total], torch.tensor([total])]).to(setting.device)
    inputs = Rotation(lambda: (setting.randn(total), setting.randn(total), setting.mask(total)))
    first = slice(0, int(cu[1]))

    def packed(name: str) -> Variant:
        def f(*a: Tensor) -> Tensor:
            return fastrlhf.gae(*a, cu_seqlens=cu, gamma=0.99, backend=name)[0]

        return Variant(lambda: f(*inputs.take()), lambda: f(*inputs.first)[first])

    yield Case(
        "gae", f"packed {total} tokens, {len(cu) - 1} sequences", variants(setting, "gae", packed), 17 * total,
        lambda: _gae64(*(t[None, first] for t in inputs.first))[0], writes=True,
    )  # fmt: skip


def _gae64(r: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return gae_reference.gae(r.cpu().double(), v.cpu().double(), mask.cpu(), gamma=0.99)[0]


def _verl_gae(f: Callable[..., Any], r: Tensor, v: Tensor, mask: Tensor) -> Any:
    return f(r, v, mask.float(), 0.99, 0.95)


def token_counts(setting: Setting) -> list[tuple[int, int]]:
    return [(4, 50)] if setting.short else [(2048, 4096), (64, 1024), (256, 4096)]  # 8M, 64k, 1M


def policy_losses(setting: Setting) -> Iterator[Case]:
    """Floor: log-probs, old ones, advantages and mask in, the gradient out, 17 bytes a token."""
    for B, T in token_counts(setting):

        def make() -> Inputs:
            old = -torch.rand(B, T, device=setting.device)
            return old + 0.3 * setting.randn(B, T), old, setting.randn(B, T), setting.mask(B, T)

        inputs = Rotation(make)

        def step(f: Callable[..., Any], lp: Tensor, *rest: Tensor) -> Tensor:
            leaf = lp.detach().requires_grad_()
            return gradient(f(leaf, *rest)[0], None, leaf)

        def variant(f: Callable[..., Any]) -> Variant:
            return Variant(lambda: step(f, *inputs.take()), lambda: step(f, *inputs.first))

        found = variants(
            setting, "policy_loss", lambda name: variant(lambda *a: fastrlhf.policy_loss(*a, backend=name))
        )  # fmt: skip
        found |= {"torch eager": variant(policy_loss.plain), "torch.compile": variant(compiled(policy_loss.plain))}
        verl, config = peers.verl_algorithm("compute_policy_loss_vanilla"), peers.find("verl.workers.config", "FSDPActorConfig")
        if verl and config:
            settings = config(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
            found["verl compute_policy_loss_vanilla"] = variant(
                lambda x, o, a, m: verl(o, x, a, m.float(), "token-mean", settings)
            )

        def exact() -> Tensor:
            lp, old, A, mask = inputs.first
            return step(policy_loss.plain, lp.double(), old.double(), A.double(), mask)

        yield Case(
            "policy_loss", f"{B * T} tokens, forward + backward + stats", found, 17 * B * T, exact, writes=True
        )  # fmt: skip


def value_losses(setting: Setting) -> Iterator[Case]:
    """Floor: values, old ones, returns and mask in, the gradient out, 17 bytes a token."""
    for B, T in token_counts(setting):

        def make() -> Inputs:
            old = setting.randn(B, T)
            return old + 0.3 * setting.randn(B, T), old, setting.randn(B, T), setting.mask(B, T)

        inputs = Rotation(make)

        def step(f: Callable[..., Tensor], v: Tensor, *rest: Tensor) -> Tensor:
            leaf = v.detach().requires_grad_()
            return gradient(f(leaf, *rest), None, leaf)

        def variant(f: Callable[..., Tensor]) -> Variant:
            return Variant(lambda: step(f, *inputs.take()), lambda: step(f, *inputs.first))

        found = variants(setting, "value_loss", lambda name: variant(lambda *a: fastrlhf.value_loss(*a, backend=name).loss))
        plain = policy_loss.plain_value
        found |= {"torch eager": variant(plain), "torch.compile": variant(compiled(plain))}
        verl = peers.verl_algorithm("compute_value_loss")
        if verl:
            found["verl compute_value_loss"] = variant(lambda v, o, r, m: verl(v, r, o, m.float(), 0.2)[0])

        def exact() -> Tensor:
            v, old, r, mask = inputs.first
            return step(plain, v.double(), old.double(), r.double(), mask)

        yield Case("value_loss", f"{B * T} tokens, forward + backward + stats", found, 17 * B * T, exact, writes=True)


def rollouts(setting: Setting) -> Iterator[Case]:
    """Rewards, advantages and whitening in one call. Floor: log-probs, reference's, values and mask in; rewards, KL,
    advantages and returns out, 29 bytes a token."""
    B, T = (4, 50) if setting.short else (512, 4096)
    inputs = Rotation(lambda: (*(setting.randn(B, T) for _ in range(3)), setting.mask(B, T)))
    rewards_of_rows = setting.randn(B)

    def fused(name: str) -> Variant:
        return Variant(
            lambda: fastrlhf.experience(rewards_of_rows, *inputs.take(), kl_coef=0.1, whiten=True, backend=name)
        )  # fmt: skip

    def separate(name: str) -> Variant:
        def run() -> None:
            lp, ref, values, mask = inputs.take()
            rewards, _ = fastrlhf.shape_rewards(rewards_of_rows, lp, ref, mask, kl_coef=0.1, backend=name)
            fastrlhf.gae(rewards, values, mask, whiten=True, backend=name)

        return Variant(run)

    found = variants(setting, "experience", fused)
    found |= {f"{name}, op by op": v for name, v in variants(setting, "gae", separate).items()}
    yield Case("experience", f"{B}x{T}, whitened", found, 29 * B * T, writes=True)


def statistics_(setting: Setting) -> Iterator[Case]:
    """Whitening's floor: two reads of elements and mask, since the moments come first, and the result. The variance's: one
    read."""
    B, T = (4, 50) if setting.short else (2048, 4096)
    inputs = Rotation(lambda: (setting.randn(B, T), setting.mask(B, T)))
    for op, floor, writes in (("whiten", 14, True), ("masked_var", 5, False)):
        function, definition = getattr(fastrlhf, op), getattr(stats_reference, op)

        def variant(f: Callable[..., Tensor]) -> Variant:
            return Variant(lambda: f(*inputs.take()), lambda: f(*inputs.first))

        def ours(name: str) -> Variant:
            return variant(lambda x, m: function(x, m, backend=name))

        def plain(x: Tensor, m: Tensor) -> Tensor:
            return definition(x, m)

        found = variants(setting, op, ours)
        found |= {"torch eager": variant(plain), "torch.compile": variant(compiled(plain))}
        verl = peers.verl_functional("masked_whiten" if op == "whiten" else op)
        if verl:
            found[f"verl {verl.__name__}"] = variant(lambda x, m: verl(x, m.float()))
        x, m = inputs.first
        yield Case(op, f"{B * T} elements", found, floor * B * T, lambda: plain(x.double(), m), writes=writes)


def draws(setting: Setting) -> Iterator[Case]:
    """Sampling. Floor: one read of the logits."""
    rows, vocab = (8, 1000) if setting.short else (256, 128256)
    inputs = Rotation(lambda: setting.logits(rows, vocab)[:1])
    for text, cut in (("", {}), (", top_p 0.9", {"top_p": 0.9})):

        def ours(name: str) -> Variant:
            return Variant(lambda: fastrlhf.sample(*inputs.take(), seed=0, backend=name, **cut))

        def plain(x: Tensor) -> Any:
            return sampling.plain_top_p(x.float(), cut["top_p"]) if cut else sampling.plain(x.float())

        found = variants(setting, "sample", ours)
        found["torch eager"] = Variant(lambda: plain(*inputs.take()))
        yield Case("sample", f"{rows}x{vocab} bfloat16{text}", found, inputs.first[0].nbytes)


def calls(setting: Setting) -> Iterator[Case]:
    """64 tokens: what a call costs the host. Ours as chosen when no backend is named, and in Triton."""
    with torch.device(setting.device):
        cases = list(call_cost.cases(True))

    def in_triton(run: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            backends._default = "triton"
            try:
                return run()
            finally:
                backends._default = None

        return call

    for case in cases:
        if "triton" in setting.ours:
            case.variants[f"{OURS} triton"] = Variant(in_triton(case.variants[OURS].run))
        yield case


SUITES: dict[str, Callable[[Setting], Iterator[Case]]] = {
    "heads": gpu_heads.forward, "head_gradients": gpu_heads.gradients, "head_losses": gpu_heads.losses,
    "scores": scores, "trained": trained, "losses_of_logits": losses_of_logits, "gae": advantages,
    "policy_loss": policy_losses, "kl_full": divergences, "calls": calls, "value_loss": value_losses,
    "experience": rollouts, "statistics": statistics_, "sample": draws,
}  # fmt: skip
