"""Every op, called once on small odd sizes: rows that begin at any byte and rows on 16, vocabularies of no power of two, empty
segments, every kind of mask. The tests beside this run them on a GPU; compute-sanitizer runs the whole file:
python -m tests.gpu.calls --device cuda --backend triton"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import fastrlhf as f
import torch
from fastrlhf.kernels.policy_loss.reference import KINDS, REDUCTIONS
from fastrlhf.ops import backend as backends
from torch import Tensor

from bench import linear_head

Inputs = dict[str, Tensor]
WIDE, NARROW, FLAGSHIP = 50257, 1000, 128256  # rows of the first are not aligned to more than their dtype


SMALL, LONG, LARGE = (5, 77), (3, 5001), (300, 3001)  # rows, tokens of each


class Maker:
    """Inputs from a seed, the same on any device; LARGE fills a GPU, rows of LONG take more than one warp, unit or block."""

    def __init__(self, device: str, seed: int = 0, size: tuple[int, int] = SMALL) -> None:
        self.device, self.generator = device, torch.Generator().manual_seed(seed)
        self.rows, self.length = size

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, device="cpu").to(dtype).to(self.device)

    def mask(self, *shape: int) -> Tensor:
        """Rows with nothing counted and rows with all, among others."""
        mask = torch.rand(shape, generator=self.generator, device="cpu") < 0.6
        if len(shape) > 1 and shape[0] > 2:
            mask[0], mask[1] = False, True
        return mask.to(self.device)

    def labels(self, vocab: int) -> Tensor:
        labels = torch.randint(0, vocab, (self.rows,), generator=self.generator, device="cpu")
        labels[self.rows // 2] = -100
        return labels.to(self.device)

    def logits(self, vocab: int, dtype: torch.dtype, offset: int = 1) -> Inputs:
        """`offset` elements past the beginning of their memory; with none, and whole vectors a row, on 16 bytes."""
        flat = self.randn(self.rows * vocab + offset).mul_(3).to(dtype)
        return {"logits": flat[offset:].view(self.rows, vocab), "labels": self.labels(vocab)}

    def two(self, vocab: int, dtype: torch.dtype) -> Inputs:
        return {
            "x": self.randn(self.rows, vocab, dtype=dtype),
            "y": self.randn(self.rows, vocab, dtype=dtype),
            "m": self.row_mask(),
        }

    def teacher(self, vocab: int, k: int) -> Inputs:
        given = self.two(vocab, torch.bfloat16)
        values, ids = given["y"].topk(k)
        return given | {"y": values, "ids": ids}

    def row_mask(self) -> Tensor:
        return torch.arange(self.rows, device=self.device) != 2

    def of_rows(self, *names: str) -> Inputs:
        return {name: self.randn(self.rows) for name in names}

    def csr(self, vocab: int) -> Inputs:
        """Kept sets, one of them empty; the same for every seed, as a graph's shapes are."""
        keep = torch.rand(self.rows, vocab, generator=torch.Generator().manual_seed(9), device="cpu") < 0.05
        keep[1] = False
        ends = keep.sum(-1).cumsum(0)
        start = torch.zeros(1, dtype=torch.long, device="cpu")
        return {"indptr": torch.cat([start, ends]).to(self.device), "indices": keep.nonzero()[:, 1].to(self.device)}

    def tokens(self, *names: str) -> Inputs:
        """(rows, length) each, with a mask, and a value for each row."""
        out = {name: self.randn(self.rows, self.length) for name in names}
        return {**out, "mask": self.mask(self.rows, self.length), "of_rows": self.randn(self.rows)}

    def packed(self, *names: str) -> Inputs:
        """Segments of length 0 and 1 among them."""
        total = self.rows * self.length
        cu = torch.tensor([0, 0, 1, total // 2, total // 2, total - 3, total], device=self.device)
        out = {name: self.randn(total) for name in names}
        return {**out, "mask": self.mask(total), "of_rows": self.randn(6), "cu": cu}


@dataclass(frozen=True)
class Call:
    op: str
    make: Callable[[Maker], Inputs]
    run: Callable[[Inputs, str], Any]
    gradient_of: tuple[str, ...] = ()
    by_row: bool = False  # every input and result has the rows first, and a row's result is its own
    in_graph: bool = True  # the shapes of its results are known to the host


def execute(call: Call, inputs: Inputs, backend: str) -> list[Tensor]:
    """Results, then gradients."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in call.gradient_of}
    out = tensors(call.run(inputs | leaves, backend))
    if not leaves:
        return out
    differentiable = [t for t in out if t.requires_grad]
    upstream = [torch.full_like(t, 1.5) for t in differentiable]
    return [t.detach() for t in out] + list(torch.autograd.grad(differentiable, list(leaves.values()), upstream))


def tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    return [t for x in out for t in tensors(x)] if isinstance(out, (tuple, list)) else []


LP = ("lp", "old", "adv", "ref", "rollout")
LOSS = ("lp", "old", "adv")


def _policy(t: Inputs, backend: str, **options: Any) -> Any:
    return f.policy_loss(
        t["lp"], t["old"], t["adv"], t["mask"], rollout_logprobs=t["rollout"], ref_logprobs=t["ref"], kl_coef=0.05,
        rollout_correction="tis", cu_seqlens=t.get("cu"), backend=backend, **options,
    )  # fmt: skip


def _experience(t: Inputs, backend: str, **options: Any) -> Any:
    arguments = (t["of_rows"], t["lp"], t["ref"], t["v"], t["mask"])
    return f.experience(*arguments, kl_coef=0.1, gamma=0.99, cu_seqlens=t.get("cu"), backend=backend, **options)


def _gae(t: Inputs, backend: str, **options: Any) -> Any:
    return f.gae(t["r"], t["v"], t["mask"], gamma=0.99, cu_seqlens=t.get("cu"), backend=backend, **options)


CALLS: dict[str, Call] = {
    "logprobs": Call(
        "logprobs", lambda g: g.logits(WIDE, torch.bfloat16),
        lambda t, b: f.logprobs(t["logits"], t["labels"], entropy=True, lse=True, backend=b), ("logits",), by_row=True,
    ),
    **{
        f"logprobs_{vocab}": Call(
            "logprobs", lambda g, v=vocab: g.logits(v, torch.bfloat16, 0),
            lambda t, b: f.logprobs(t["logits"], t["labels"], entropy=True, lse=True, backend=b), ("logits",), by_row=True,
        )
        for vocab in (NARROW, FLAGSHIP)
    },
    "logprobs_no_entropy": Call(
        "logprobs", lambda g: g.logits(FLAGSHIP, torch.bfloat16, 0),
        lambda t, b: f.logprobs(t["logits"], t["labels"], backend=b), ("logits",), by_row=True,
    ),
    "logprobs_settings": Call(
        "logprobs", lambda g: g.logits(NARROW, torch.float32) | {"T": g.randn(g.rows).abs() + 0.5},
        lambda t, b: f.logprobs(t["logits"], t["labels"], temperature=t["T"], softcap=20.0, entropy=True, backend=b),
        ("logits",), by_row=True,
    ),
    "logprobs_kept_mask": Call(
        "logprobs", lambda g: g.logits(NARROW, torch.float16) | {"kept": g.mask(g.rows, NARROW)},
        lambda t, b: f.logprobs(t["logits"], t["labels"], kept=t["kept"], entropy=True, backend=b), ("logits",), by_row=True,
    ),
    "logprobs_kept_csr": Call(
        "logprobs", lambda g: g.logits(NARROW, torch.bfloat16) | g.csr(NARROW),
        lambda t, b: f.logprobs(t["logits"], t["labels"], kept=(t["indptr"], t["indices"]), backend=b), ("logits",),
    ),
    "logprobs_in_place": Call(
        "logprobs", lambda g: g.logits(WIDE, torch.bfloat16),
        lambda t, b: f.logprobs(t["logits"] * 1, t["labels"], inplace_backward=True, backend=b), ("logits",), by_row=True,
    ),
    "kl": Call(
        "kl", lambda g: g.tokens("x", "y"), lambda t, b: f.kl(t["x"], t["y"], clamp_output=10.0, backend=b), ("x", "y"), by_row=True,
    ),
    **{
        f"kl_full_{direction}": Call(
            "kl_full", lambda g: g.two(WIDE, torch.bfloat16),
            lambda t, b, d=direction: f.kl_full(t["x"], t["y"], direction=d, mask=t["m"], backend=b), ("x", "y"), by_row=True,
        )
        for direction in ("forward", "reverse", "js")
    },
    "shape_rewards": Call(
        "shape_rewards", lambda g: g.tokens("lp", "ref"),
        lambda t, b: f.shape_rewards(t["of_rows"], t["lp"], t["ref"], t["mask"], kl_coef=0.1, backend=b), by_row=True,
    ),
    "shape_rewards_packed": Call(
        "shape_rewards", lambda g: g.packed("lp", "ref"),
        lambda t, b: f.shape_rewards(t["of_rows"], t["lp"], t["ref"], t["mask"], kl_coef=0.1, cu_seqlens=t["cu"], backend=b),
    ),
    **{
        f"gae_{mode}": Call(
            "gae", lambda g: g.tokens("r", "v"),
            lambda t, b, m=mode: _gae(t, b, mask_mode=m, lam=t["of_rows"].sigmoid(), bootstrap=t["of_rows"]), by_row=True,
        )
        for mode in ("carry", "zero", "none")
    },
    "gae_packed": Call("gae", lambda g: g.packed("r", "v"), _gae),
    "gae_whitened": Call("gae", lambda g: g.tokens("r", "v"), lambda t, b: _gae(t, b, whiten=True)),
    "discounted_returns": Call(
        "discounted_returns", lambda g: g.tokens("r"),
        lambda t, b: f.discounted_returns(t["r"], t["mask"], gamma=0.9, backend=b), by_row=True,
    ),
    "experience": Call("experience", lambda g: g.tokens("lp", "ref", "v"), _experience, by_row=True),
    "experience_whitened": Call("experience", lambda g: g.tokens("lp", "ref", "v"), lambda t, b: _experience(t, b, whiten=True)),
    "experience_packed": Call("experience", lambda g: g.packed("lp", "ref", "v"), lambda t, b: _experience(t, b, whiten=True)),
    "group_advantages": Call(
        "group_advantages", lambda g: {"s": g.randn(g.rows), "ids": torch.arange(g.rows, device=g.device) // 4},
        lambda t, b: f.group_advantages(t["s"], t["ids"], backend=b),
    ),
    **{
        f"masked_mean_{dim}": Call(
            "masked_mean", lambda g: g.tokens("x"),
            lambda t, b, d=dim: f.masked_mean(t["x"], t["mask"], d, backend=b), ("x",), by_row=dim == 1,
        )
        for dim in (None, 0, 1)
    },
    "masked_var": Call("masked_var", lambda g: g.tokens("x"), lambda t, b: f.masked_var(t["x"], t["mask"], backend=b), ("x",)),
    "whiten": Call("whiten", lambda g: g.tokens("x"), lambda t, b: f.whiten(t["x"], t["mask"], backend=b), ("x",)),
    **{
        f"policy_loss_{kind}_{reduction}": Call(
            "policy_loss", lambda g: g.tokens(*LP), lambda t, b, k=kind, r=reduction: _policy(t, b, kind=k, reduction=r), ("lp",)
        )
        for kind, reduction in [*((k, "token-mean") for k in KINDS), *(("ppo", r) for r in REDUCTIONS if r != "token-mean")]
    },
    "policy_loss_packed": Call("policy_loss", lambda g: g.packed(*LP), lambda t, b: _policy(t, b, dual_clip=3.0), ("lp",)),
    "policy_loss_gspo_packed": Call("policy_loss", lambda g: g.packed(*LP), lambda t, b: _policy(t, b, kind="gspo"), ("lp",)),
    "policy_loss_unmasked": Call(
        "policy_loss", lambda g: g.tokens(*LOSS),
        lambda t, b: f.policy_loss(t["lp"], t["old"], t["of_rows"], None, backend=b), ("lp",),
    ),
    "value_loss": Call(
        "value_loss", lambda g: g.tokens(*LOSS),
        lambda t, b: f.value_loss(t["lp"], t["old"], t["adv"], t["mask"], backend=b), ("lp",),
    ),
    "value_loss_packed": Call(
        "value_loss", lambda g: g.packed(*LOSS),
        lambda t, b: f.value_loss(
            t["lp"], t["old"], t["adv"], t["mask"], reduction="seq-mean-token-mean", cu_seqlens=t["cu"], backend=b
        ), ("lp",),
    ),
    "preference_loss": Call(
        "preference_loss", lambda g: {name: g.randn(g.length) for name in "abcd"},
        lambda t, b: f.preference_loss(t["a"], t["b"], t["c"], t["d"], kind="dpo", backend=b), ("a", "b"),
    ),
    "reward_loss": Call(
        "reward_loss", lambda g: {name: g.randn(g.length) for name in "ab"},
        lambda t, b: f.reward_loss(t["a"], t["b"], backend=b), ("a", "b"),
    ),
    "regression_loss": Call(
        "regression_loss", lambda g: g.tokens("p", "t"), lambda t, b: f.regression_loss(t["p"], t["t"], backend=b), ("p",)
    ),
    **{
        f"topk_distill_loss_{direction}": Call(
            "topk_distill_loss", lambda g: g.teacher(WIDE, 50),
            lambda t, b, d=direction: f.topk_distill_loss(t["x"], t["y"], t["ids"], t["m"], direction=d, backend=b), ("x",),
        )
        for direction in ("forward", "reverse")
    },
    "sequence_logprobs": Call(
        "sequence_logprobs", lambda g: g.tokens("lp"),
        lambda t, b: f.sequence_logprobs(t["lp"], t["mask"], average=True, backend=b), ("lp",), by_row=True,
    ),
    "sequence_logprobs_packed": Call(
        "sequence_logprobs", lambda g: g.packed("lp"),
        lambda t, b: f.sequence_logprobs(t["lp"], cu_seqlens=t["cu"], backend=b), ("lp",),
    ),
    **{
        f"sample_{name}": Call(
            "sample", lambda g: {"x": g.logits(NARROW, torch.bfloat16)["logits"], "seed": torch.arange(g.rows, device=g.device)},
            lambda t, b, o=options: f.sample(t["x"], seed=t["seed"], backend=b, **o), by_row="kept" not in options,
            in_graph="kept" not in options,
        )
        for name, options in {
            "plain": {}, "cut": {"top_k": 50, "top_p": 0.9, "min_p": 0.01}, "kept": {"top_p": 0.9, "kept": True},
        }.items()
    },
    **{
        f"logits_policy_loss_{vocab}": Call(
            "logits_policy_loss",
            lambda g, v=vocab: g.logits(v, torch.bfloat16, int(v == WIDE)) | g.of_rows("old", "adv") | {"mask": g.row_mask()},
            lambda t, b: f.logits_policy_loss(t["logits"], t["labels"], t["old"], t["adv"], t["mask"], backend=b), ("logits",),
        )
        for vocab in (WIDE, NARROW, FLAGSHIP)
    },
}  # fmt: skip

# the bits of these are compared over 100 runs
FLAGSHIP_CALLS = (
    f"logprobs_{FLAGSHIP}", "logprobs_no_entropy", f"logits_policy_loss_{FLAGSHIP}", "gae_carry", "gae_packed",
    "experience_whitened", "policy_loss_ppo_token-mean", "value_loss", "kl_full_forward",
)  # fmt: skip
# a length changes nothing of these
OVER_A_VOCABULARY = ("logprobs", "logits_policy_loss", "kl_full", "topk_distill_loss", "sample")


def names(backend: str) -> list[str]:
    """The calls whose op has kernels of this backend."""
    having = {"cuda": backends.CUDA, "triton": backends.TRITON}
    return [name for name, call in CALLS.items() if call.op in having.get(backend, (call.op,))]


def cases(of: Callable[[str, Call], bool] = lambda name, call: True) -> list[tuple[str, str]]:
    """(backend, name) of some calls."""
    return [(backend, name) for backend in ("cuda", "triton") for name in names(backend) if of(name, CALLS[name])]


# the cases of test_device.py's tests, which bench/bars.py counts
TESTS = {
    "test_graph": cases(lambda name, call: call.in_graph),
    "test_same_bits": cases(lambda name, call: name in FLAGSHIP_CALLS),
    "test_the_rest_gives_the_same_bits_too": cases(lambda name, call: name not in FLAGSHIP_CALLS),
    "test_rows_of_any_batch": cases(lambda name, call: call.by_row),
    "test_one_launch": [("cuda", "policy_loss"), ("triton", "policy_loss")],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", choices=backends.BACKENDS, default="triton")
    given = parser.parse_args()
    failed = 0
    sizes = [(name, SMALL) for name in names(given.backend)]
    sizes += [(name, LONG) for name in names(given.backend) if CALLS[name].op not in OVER_A_VOCABULARY]
    for name, size in sizes:
        try:
            for result in execute(CALLS[name], CALLS[name].make(Maker(given.device, size=size)), given.backend):
                result.cpu()
        except Exception:
            failed += 1
            print(f"{name} {size}:\n{traceback.format_exc(limit=-3)}")
    if given.backend == "cuda" and linear_head.available():
        for rows, vocab, width in ((1, 300, 64), (300, 1001, 200)):
            head = linear_head.head(rows, vocab, width, device=given.device, bias=torch.zeros(vocab, device=given.device))
            of, g = head.statistics(), torch.ones(rows, device=given.device)
            for dtype in (torch.bfloat16, torch.float32):
                head.gradient(of, (g, g, None), dtype).cpu()
            partials, kept, references = head.exponentials()
            head.gradient_in_place(head.combined(partials), (g, g, None), kept, references).cpu()
    print(f"{given.backend}: {len(sizes)} calls, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
