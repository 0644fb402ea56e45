"""Inputs on which kernels of this kind have been wrong before, for every operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import ops

Tensors = dict[str, Tensor]
Function = Callable[[Tensors, Any], Any]


@dataclass(frozen=True)
class Shapes:
    """Rows, tokens a row, vocabulary."""

    rows: int
    length: int
    vocab: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.length}x{self.vocab}"


@dataclass
class Case:
    """`function(inputs, backend)` gives tensors; those of `grads` are differentiated. The inputs are made when asked for."""

    op: str
    input: str
    inputs: Callable[[], Tensors]
    function: Function
    grads: tuple[str, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)


def cases(shapes: Shapes, dtype: torch.dtype, device: str) -> Iterator[Case]:
    """All of them. Logits are in `dtype`; what is per token is float32, as everywhere."""
    make = _Maker(shapes, dtype, device)
    yield from logprob_cases(make)
    yield from token_cases(make)
    yield from loss_cases(make)
    yield from pair_cases(make)
    yield from rollout_cases(make)
    yield from vocabulary_cases(make)


def _given(tensors: Tensors) -> Callable[[], Tensors]:
    return lambda: tensors


@dataclass(frozen=True)
class _Maker:
    shapes: Shapes
    dtype: torch.dtype
    device: str

    def normal(self, *shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
        return values.to(dtype or torch.float32).to(self.device)

    def logits(self, rows: int, vocab: int, scale: float = 3.0, offset: float = 0.0) -> Tensor:
        return self.normal(rows, vocab, scale=scale, dtype=torch.float32).add_(offset).to(self.dtype)

    def labels(self, rows: int, vocab: int) -> Tensor:
        return torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(1)).to(self.device)

    def batch(self, seed: int, scale: float = 1.0) -> Tensor:
        return self.normal(self.shapes.rows, self.shapes.length, seed=seed, scale=scale)

    def masks(self) -> Iterator[tuple[str, Tensor]]:
        B, T = self.shapes.rows, self.shapes.length
        gaps = torch.rand(B, T, generator=torch.Generator().manual_seed(2)) < 0.7
        gaps[-1, T // 2 :] = False
        yield "gaps inside the mask", gaps.to(self.device)
        some = gaps.clone()
        some[0] = False
        yield "a row with nothing counted", some.to(self.device)
        yield "all masked", torch.zeros_like(gaps).to(self.device)


def logprob_cases(make: _Maker) -> Iterator[Case]:
    vocab = make.shapes.vocab
    rows = max(1, min(make.shapes.rows * make.shapes.length, (1 << 23) // vocab))
    odd = vocab + 1 + vocab % 2  # a multiple of nothing

    def plain(inputs: Tensors, backend: Any) -> Any:
        out = ops.logprobs(inputs["logits"], inputs["labels"], entropy=True, lse=True, backend=backend)
        return out.logprobs, out.entropy, out.lse

    def case(name: str, logits: Callable[[], Tensor], labels: Callable[[Tensor], Tensor], function: Function = plain) -> Case:
        def inputs() -> Tensors:
            x = logits()
            return {"logits": x, "labels": labels(x)}

        return Case("logprobs", name, inputs, function, ("logits",))

    def drawn(x: Tensor) -> Tensor:
        return make.labels(x.shape[0], x.shape[-1])

    yield case(f"{rows} x {vocab}", lambda: make.logits(rows, vocab), drawn)
    yield case(f"a vocabulary of {odd}, a multiple of nothing", lambda: make.logits(min(rows, 64), odd), drawn)
    yield case("a vocabulary of 1", lambda: make.logits(5, 1), drawn)
    yield case("peaked rows", lambda: make.logits(min(rows, 64), vocab, 40.0), lambda x: x.argmax(-1))
    if make.dtype == torch.float32:
        yield case("an offset of 1e4 on all logits", lambda: make.logits(min(rows, 64), vocab, offset=1e4), drawn)

    def banned() -> Tensor:
        x = make.logits(min(rows, 64), vocab)
        x[:, ::3] = -torch.inf
        return x

    if vocab > 1:  # of one, none would be left
        yield case("-inf logits", banned, lambda x: torch.ones_like(drawn(x)))

    def ignored(x: Tensor) -> Tensor:
        y = drawn(x)
        y[::2] = -100
        return y

    yield case("every second label ignored", lambda: make.logits(min(rows, 64), vocab), ignored)
    yield case("all labels ignored", lambda: make.logits(8, vocab), lambda x: torch.full_like(drawn(x), -100))

    def tempered(inputs: Tensors, backend: Any) -> Any:
        out = ops.logprobs(inputs["logits"], inputs["labels"], temperature=0.6, softcap=30.0, entropy=True, backend=backend)
        return out.logprobs, out.entropy

    yield case("temperature and soft cap", lambda: make.logits(min(rows, 64), vocab), drawn, tempered)
    yield case("rows that lie apart", lambda: make.logits(min(rows, 64), vocab + 5)[:, :vocab], drawn)


def token_cases(make: _Maker) -> Iterator[Case]:
    for name, mask in make.masks():
        tensors = {"x": make.batch(3), "r": make.batch(4), "v": make.batch(5), "mask": mask}
        for mode in ("carry", "zero"):
            yield Case(
                "gae", f"{name}, mask_mode {mode}", _given(tensors),
                partial(_gae, mode),
            )  # fmt: skip
        yield Case("masked_mean", name, _given(tensors), lambda t, b: ops.masked_mean(t["x"], t["mask"], backend=b), ("x",))
        yield Case("masked_var", name, _given(tensors), lambda t, b: ops.masked_var(t["x"], t["mask"], backend=b), ("x",))
        yield Case("whiten", name, _given(tensors), lambda t, b: ops.whiten(t["x"], t["mask"], backend=b), ("x",))
        large = {"x": make.batch(3) + 1e4, "mask": mask}
        yield Case(
            "masked_var", f"{name}, a mean of 1e4", _given(large), lambda t, b: ops.masked_var(t["x"], t["mask"], backend=b)
        )
        hostile = {"x": make.batch(3).masked_fill(~mask, torch.nan), "mask": mask}
        yield Case(
            "masked_mean",
            f"{name}, NaN outside it",
            _given(hostile),
            lambda t, b: ops.masked_mean(t["x"], t["mask"], backend=b),
        )
    scores = {"scores": make.normal(make.shapes.rows * 4, seed=6), "ids": _groups(make)}
    for kind in ("grpo", "dr_grpo", "rloo"):
        yield Case(
            "group_advantages", f"{kind}, groups of several sizes, one of one", _given(scores),
            partial(_group_advantages, kind),
        )  # fmt: skip
    for kind in ("k1", "k2", "k3"):
        for name, scale, clamp in (("near", 0.3, None), ("log-ratios of 60, clamped", 60.0, 20.0)):
            pair = {"a": make.batch(7, scale), "b": make.batch(8, scale)}
            yield Case(
                "kl", f"{kind}, {name}", _given(pair),
                partial(_kl, kind, clamp),
                ("a", "b"),
            )  # fmt: skip


def _groups(make: _Maker) -> Tensor:
    count = make.shapes.rows * 4
    ids = torch.arange(count) // 3
    ids[-1] = 10**6
    return ids.flip(0).to(make.device)


def loss_cases(make: _Maker) -> Iterator[Case]:
    old = -make.batch(9).abs()
    for name, mask in make.masks():
        tensors = {
            "logprobs": old + make.batch(10, 0.5), "old": old, "advantages": make.batch(11), "mask": mask,
            "values": make.batch(12), "old_values": make.batch(13), "returns": make.batch(14),
        }  # fmt: skip
        for kind, options in (
            ("ppo", {"clip_high": 0.28, "dual_clip": 3.0, "ratio_clamp": 20.0}), ("gspo", {"reduction": "seq-mean-token-mean"}),
            ("cispo", {}), ("reinforce", {"reduction": "seq-mean-token-sum-norm"}),
        ):  # fmt: skip
            yield Case(
                "policy_loss", f"{kind}, {name}", _given(tensors),
                partial(_policy_loss, kind, options),
                ("logprobs",),
            )  # fmt: skip
        yield Case(
            "value_loss", name, _given(tensors),
            lambda t, b: ops.value_loss(t["values"], t["old_values"], t["returns"], t["mask"], backend=b).loss, ("values",),
        )  # fmt: skip


def pair_cases(make: _Maker) -> Iterator[Case]:
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected")
    pairs = {n: -make.normal(make.shapes.rows * 8, seed=20 + i, scale=30.0).abs() for i, n in enumerate(names)}
    for kind in ("dpo", "ipo", "hinge"):
        yield Case(
            "preference_loss", f"{kind}, log-ratios of 30", _given(pairs),
            partial(_preference_loss, kind), names[:2],
        )  # fmt: skip
    rewards = {n: pairs[n] for n in names[:2]}
    yield Case(
        "reward_loss",
        "differences of 30",
        _given(rewards),
        lambda t, b: ops.reward_loss(*t.values(), backend=b).loss,
        names[:2],
    )
    targets = make.normal(make.shapes.rows * 8, seed=30)
    targets[::3] = -100.0
    told = {"predictions": make.normal(make.shapes.rows * 8, seed=31), "targets": targets}
    yield Case(
        "regression_loss", "a third without a target", _given(told),
        lambda t, b: ops.regression_loss(t["predictions"], t["targets"], backend=b).loss, ("predictions",),
    )  # fmt: skip


def rollout_cases(make: _Maker) -> Iterator[Case]:
    for name, mask in make.masks():
        t = {
            "scores": make.normal(make.shapes.rows, seed=40), "logprobs": -make.batch(41).abs(), "ref": -make.batch(42).abs(),
            "values": make.batch(43), "mask": mask,
        }  # fmt: skip
        options: dict[str, Any] = {"kl_coef": 0.1, "kl": "k3", "score_clip": 1.0}
        yield Case(
            "shape_rewards", name, _given(t),
            lambda t, b: ops.shape_rewards(t["scores"], t["logprobs"], t["ref"], t["mask"], backend=b, **options),
        )  # fmt: skip
        yield Case(
            "experience", name, _given(t),
            lambda t, b: ops.experience(
                t["scores"], t["logprobs"], t["ref"], t["values"], t["mask"], whiten=True, backend=b, **options
            ),
        )  # fmt: skip
        yield Case(
            "discounted_returns", name, _given(t),
            lambda t, b: ops.discounted_returns(t["values"], t["mask"], gamma=0.97, backend=b),
        )  # fmt: skip
        yield Case(
            "sequence_logprobs", name, _given(t),
            lambda t, b: ops.sequence_logprobs(t["logprobs"], t["mask"], average=True, backend=b), ("logprobs",),
        )  # fmt: skip


def vocabulary_cases(make: _Maker) -> Iterator[Case]:
    B, T = make.shapes.rows, min(make.shapes.length, 16)
    vocab = make.shapes.vocab + 1
    logits = make.logits(B * T, vocab).view(B, T, vocab)
    other = make.normal(B, T, vocab, seed=50, scale=3.0).to(make.dtype)
    banned = other.clone()
    banned[..., 1::4] = -torch.inf
    pair = {"logits": logits, "ref": other}
    for direction in ("forward", "reverse", "js"):
        yield Case(
            "kl_full", f"{direction}, {B * T} x {vocab}", _given(pair),
            partial(_kl_full, direction), ("logits", "ref"),
        )  # fmt: skip
    for direction in ("forward", "reverse"):
        yield Case(
            "topk_distill_loss", f"{direction}, {min(20, vocab)} of {vocab}", _given(pair),
            partial(_topk_distill_loss, direction), ("logits",),
        )  # fmt: skip
    old = -make.normal(B, T, seed=51).abs()
    policy = {
        "logits": logits, "labels": make.labels(B * T, vocab).view(B, T), "old": old, "advantages": make.normal(B, T, seed=52),
        "mask": torch.ones(B, T, dtype=torch.bool, device=make.device),
    }  # fmt: skip
    yield Case(
        "logits_policy_loss", f"ppo, {B * T} x {vocab}", _given(policy),
        lambda t, b: ops.logits_policy_loss(t["logits"], t["labels"], t["old"], t["advantages"], t["mask"], backend=b).loss,
        ("logits",),
    )  # fmt: skip
    yield from head_cases(make, policy)
    for name, x in (("top-k", other), ("top-k, -inf logits", banned)):
        drawn = {"logits": x.reshape(B * T, vocab)}
        yield Case(
            "sample", f"{name}, the log-probs of its tokens", _given(drawn),
            lambda t, b: _sampled(t["logits"], b),
        )  # fmt: skip


def _sampled(logits: Tensor, backend: Any) -> Tensor:
    """Tokens are drawn from the same float32 logits by every backend; their log-probs are what is compared."""
    out = ops.sample(logits.float(), top_k=50, temperature=0.8, seed=3, backend=backend)
    assert out.logprobs is not None
    return out.logprobs


def head_cases(make: _Maker, policy: Tensors) -> Iterator[Case]:
    """From hidden states; the definition rounds nothing below its own dtype, as the kernels do."""
    rows, hidden, vocab = policy["labels"].numel(), 64, make.shapes.vocab + 1
    head = {
        "hidden": make.normal(rows, hidden, seed=60).to(make.dtype),
        "weight": make.normal(vocab, hidden, seed=61, scale=0.3).to(make.dtype),
        "bias": make.normal(vocab, seed=62).to(make.dtype), "labels": policy["labels"].reshape(rows).clone(),
    }  # fmt: skip
    head["labels"][::3] = -100

    def logprobs(t: Tensors, backend: Any) -> Any:
        out = ops.linear_logprobs(
            t["hidden"], t["weight"], t["labels"], bias=t["bias"], temperature=0.8, softcap=30.0, entropy=True, backend=backend
        )
        return out.logprobs, out.entropy

    name = f"{rows} x {hidden} x {vocab}, a third of the labels ignored"
    yield Case("linear_logprobs", name, _given(head), logprobs, ("hidden", "weight", "bias"))
    ref = {"ref_hidden": make.normal(rows, hidden, seed=63).to(make.dtype), "ref_weight": head["weight"].flip(0).contiguous()}
    yield Case("linear_scores", f"k3, {name}", lambda: {n: head[n] for n in ("hidden", "weight", "labels")} | ref, _scores)
    flat = {n: policy[n].reshape(rows) for n in ("old", "advantages", "mask")}
    both = {"hidden": head["hidden"], "weight": head["weight"], "labels": policy["labels"].reshape(rows), **flat}
    yield Case(
        "linear_policy_loss", f"ppo, {rows} x {hidden} x {vocab}", _given(both),
        lambda t, b: ops.linear_policy_loss(
            t["hidden"], t["weight"], t["labels"], t["old"], t["advantages"], t["mask"], backend=b
        ).loss,
        ("hidden", "weight"),
    )  # fmt: skip


def _gae(mode: str, t: Tensors, backend: Any) -> Any:
    return ops.gae(t["r"], t["v"], t["mask"], gamma=0.99, lam=0.95, mask_mode=mode, backend=backend)


def _group_advantages(kind: str, t: Tensors, backend: Any) -> Tensor:
    return ops.group_advantages(t["scores"], t["ids"], kind=kind, backend=backend)


def _kl(kind: str, clamp: float | None, t: Tensors, backend: Any) -> Tensor:
    return ops.kl(t["a"], t["b"], kind=kind, clamp_input=clamp, backend=backend)


def _kl_full(direction: str, t: Tensors, backend: Any) -> Tensor:
    return ops.kl_full(t["logits"], t["ref"], direction=direction, backend=backend)


def _topk_distill_loss(direction: str, t: Tensors, backend: Any) -> Tensor:
    teacher, ids = t["ref"].topk(min(20, t["ref"].shape[-1]))
    return ops.topk_distill_loss(t["logits"], teacher, ids, direction=direction, backend=backend).losses


def _policy_loss(kind: str, options: dict[str, Any], t: Tensors, backend: Any) -> Tensor:
    inputs = (t["logprobs"], t["old"], t["advantages"], t["mask"])
    return ops.policy_loss(*inputs, kind=kind, backend=backend, **options).loss


def _preference_loss(kind: str, t: Tensors, backend: Any) -> Tensor:
    pair = (t["chosen"], t["rejected"], t["ref_chosen"], t["ref_rejected"])
    return ops.preference_loss(*pair, kind=kind, backend=backend).loss


def _scores(t: Tensors, backend: Any) -> Any:
    out = ops.linear_scores(t["hidden"], t["weight"], t["labels"], (t["ref_hidden"], t["ref_weight"]), backend=backend)
    return out.logprobs, out.kl
