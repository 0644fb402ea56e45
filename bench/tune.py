"""Chooses the tiles of the Triton kernels for the GPU that is here, and writes its rows of kernels/common/tiles.json.

For each kernel and size bucket a few candidates run at a size that training has; the table's present choice stays unless
another is faster by more than the noise. A choice is a matter of the row's own size only, never of how many rows there are."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastrlhf as f
import torch
from fastrlhf.kernels.common import tiles
from torch import Tensor

from . import gpu

Choice = dict[str, int]
Call = Callable[[], Any]
NOISE = 0.02  # a share of the time below which a candidate is not better
REPEATS = 25
TABLE = Path(__file__).parent.parent / "kernels" / "common" / "tiles.json"


@dataclass(frozen=True)
class Tuned:
    """A row of the table: up to the sizes of its buckets (None: the rest), what is timed for each."""

    kernel: str
    candidates: list[Choice]
    buckets: list[tuple[int | None, Callable[[], Call]]]


def choices(blocks: Sequence[int], warps: Sequence[int], least: int, **more: int) -> list[Choice]:
    """All pairs with at least `least` elements a thread."""
    pairs = itertools.product(blocks, warps)
    return [{"BLOCK": b, **more, "num_warps": w} for b, w in pairs if b >= 32 * w * least]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, device="cuda")


def chance(*shape: int) -> Tensor:
    """A mask that is mostly set."""
    return torch.rand(shape, device="cuda") < 0.8


def logits(vocab: int, size: int = 2**30) -> Tensor:
    return randn(max(size // vocab, 1), vocab, dtype=torch.bfloat16)


def gradient(output: Tensor, leaf: Tensor) -> Call:
    upstream = torch.ones_like(output)
    return lambda: torch.autograd.grad(output, leaf, upstream, retain_graph=True)


def logprobs_forward(vocab: int) -> Call:
    x = logits(vocab)
    labels = torch.randint(vocab, x.shape[:1], device="cuda")
    return lambda: f.logprobs(x, labels, entropy=True, backend="triton")


def logprobs_backward(vocab: int) -> Call:
    x = logits(vocab).requires_grad_()
    labels = torch.randint(vocab, x.shape[:1], device="cuda")
    return gradient(f.logprobs(x, labels, backend="triton").logprobs, x)


def combine() -> Call:
    from fastrlhf.kernels.logprobs import triton as kernels

    rows = 65536
    results = {name: randn(rows) for name in ("logprobs", "entropy", "lse", "max", "log_sum")}
    labels, partials = torch.zeros(rows, dtype=torch.int64, device="cuda"), randn(8, rows, 4)
    return lambda: kernels.combine(labels, None, partials, temperature=1.0, ignore_index=-100, **results)


def linear(dtype: torch.dtype) -> Call:
    rows, vocab, width = (4096, 128256, 4096) if dtype == torch.bfloat16 else (1024, 32000, 1024)
    hidden, weight = randn(rows, width, dtype=dtype), randn(vocab, width, dtype=dtype)
    labels = torch.randint(vocab, (rows,), device="cuda")
    return lambda: f.linear_logprobs(hidden, weight, labels, backend="triton")


def kl_full_forward(vocab: int) -> Call:
    x, y = logits(vocab, 2**29), logits(vocab, 2**29)
    return lambda: f.kl_full(x, y, backend="triton")


def kl_full_backward(vocab: int) -> Call:
    x, y = logits(vocab, 2**29).requires_grad_(), logits(vocab, 2**29)
    return gradient(f.kl_full(x, y, backend="triton"), x)


def kl() -> Call:
    x, y = randn(2048, 4096), randn(2048, 4096)
    return lambda: f.kl(x, y, backend="triton")


def gae() -> Call:
    x, y, mask = randn(512, 4096), randn(512, 4096), chance(512, 4096)
    return lambda: f.gae(x, y, mask, backend="triton")


def group_advantages() -> Call:
    scores, ids = randn(8192), torch.randint(1024, (8192,), device="cuda")
    return lambda: f.group_advantages(scores, ids, backend="triton")


def moments() -> Call:
    x, mask = randn(2048, 4096), chance(2048, 4096)
    return lambda: f.masked_var(x, mask, backend="triton")


def whiten() -> Call:
    x, mask = randn(2048, 4096), chance(2048, 4096)
    return lambda: f.whiten(x, mask, backend="triton")


def row_sums(length: int) -> Call:
    x, mask = randn(2**23 // length, length), chance(2**23 // length, length)
    return lambda: f.sequence_logprobs(x, mask, backend="triton")


def policy(**options: Any) -> Call:
    x, old, advantages, mask = randn(2048, 4096).requires_grad_(), randn(2048, 4096), randn(2048, 4096), chance(2048, 4096)
    return lambda: f.policy_loss(x, old, advantages, mask, backend="triton", **options)


def scale() -> Call:
    x = randn(2048, 4096).requires_grad_()
    return gradient(f.policy_loss(x, x.detach(), x.detach(), None, backend="triton").loss, x)


def value(reduction: str) -> Call:
    x, old, returns, mask = randn(2048, 4096).requires_grad_(), randn(2048, 4096), randn(2048, 4096), chance(2048, 4096)
    return lambda: f.value_loss(x, old, returns, mask, reduction=reduction, backend="triton")


def preference() -> Call:
    x, *rest = randn(4096).requires_grad_(), randn(4096), randn(4096), randn(4096)
    return lambda: f.preference_loss(x, *rest, kind="dpo", backend="triton")


def regression() -> Call:
    x, y = randn(4096).requires_grad_(), randn(4096)
    return lambda: f.regression_loss(x, y, backend="triton")


def sample(vocab: int) -> Call:
    x = logits(vocab, 2**26)
    return lambda: f.sample(x, top_p=0.9, seed=0, backend="triton")


def kept_indices(vocab: int) -> Call:
    from fastrlhf.kernels.sampling import triton as kernels

    x = logits(vocab, 2**26)
    thresholds = torch.full(x.shape[:1], 2.0, device="cuda")
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64, device="cuda"), (x >= 2).sum(-1).cumsum(0)])
    indices = torch.empty(int(indptr[-1]), dtype=torch.int64, device="cuda")
    return lambda: kernels.kept_indices(x, thresholds, indptr, indices)


def by_vocabulary(workload: Callable[[int], Call]) -> list[tuple[int | None, Callable[[], Call]]]:
    return [(256, lambda: workload(256)), (4096, lambda: workload(4096)), (None, lambda: workload(128256))]


_ROWS = choices((256, 1024, 2048, 4096, 8192), (1, 4, 8, 16), 8)  # a vector of 8 bfloat16 a thread
_TOKENS = choices((512, 1024, 2048, 4096), (2, 4, 8), 4)
TUNED = [
    Tuned("gae.rollout", choices((256, 512, 1024, 2048), (2, 4, 8), 4), [(None, gae)]),
    Tuned("group_advantages", choices((8, 16, 32), (4, 8), 0, WIDTH=128), [(None, group_advantages)]),
    Tuned("kl", _TOKENS, [(None, kl)]),
    Tuned("kl_full.backward", _ROWS, by_vocabulary(kl_full_backward)),
    Tuned("kl_full.forward", _ROWS, by_vocabulary(kl_full_forward)),
    Tuned(
        "linear_logprobs.partials",
        [
            {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": w, "num_stages": s}
            for m, n, k, w, s in itertools.product((64, 128), (32, 64, 128, 256), (32, 64), (4, 8), (3, 4))
        ],
        [(2, lambda: linear(torch.bfloat16)), (None, lambda: linear(torch.float32))],
    ),
    Tuned("logprobs.backward", _ROWS, by_vocabulary(logprobs_backward)),
    Tuned("logprobs.combine", choices((64, 128, 256), (2, 4, 8), 0), [(None, combine)]),
    Tuned("logprobs.forward", _ROWS, by_vocabulary(logprobs_forward)),
    Tuned("masked_stats.moments", _TOKENS, [(None, moments)]),
    Tuned("masked_stats.row_sums", _TOKENS, [(None, lambda: row_sums(4096))]),
    Tuned(
        "masked_stats.short_row_sums",
        [{"ROWS": r, "BLOCK": b, "num_warps": 4} for r, b in itertools.product((32, 64, 128), (8, 16, 32))],
        [(None, lambda: row_sums(128))],
    ),
    Tuned("masked_stats.standardize", _TOKENS, [(None, whiten)]),
    Tuned("policy_loss.rows", _TOKENS, [(None, lambda: policy(kind="gspo", reduction="seq-mean-token-mean"))]),
    Tuned("policy_loss.scale", _TOKENS, [(None, scale)]),
    Tuned("policy_loss.tokens", _TOKENS, [(None, policy)]),
    Tuned("preference_loss", choices((128, 256, 512), (2, 4, 8), 0), [(None, preference)]),
    Tuned("preference_loss.regression", choices((512, 1024, 2048), (4, 8), 0), [(None, regression)]),
    Tuned("sampling.kept_indices", _ROWS, by_vocabulary(kept_indices)),
    Tuned("sampling.sample", _ROWS, by_vocabulary(sample)),
    Tuned("value_loss.rows", _TOKENS, [(None, lambda: value("seq-mean-token-mean"))]),
    Tuned("value_loss.tokens", _TOKENS, [(None, lambda: value("token-mean"))]),
]


def seconds(call: Call) -> float:
    """The median of what the device takes, behind a backlog: a small kernel is not to be timed as the host."""
    for _ in range(3):
        call()
    calls, backlog = gpu.plan(call)
    return statistics.median(gpu.sample(call, calls, backlog)[0] for _ in range(REPEATS))


def best(present: Choice, timed: list[tuple[Choice, float]]) -> Choice:
    """The fastest; the present one where nothing beats it by more than the noise."""
    choice, least = min(timed, key=lambda pair: pair[1])
    now = next((t for c, t in timed if c == present), float("inf"))
    return choice if least < now * (1 - NOISE) else present


def try_all(kernel: str, candidates: list[Choice], call: Call) -> list[tuple[Choice, float]]:
    timed = []
    for choice in candidates:
        try:
            with tiles.trying(kernel, choice):
                timed.append((choice, seconds(call)))
        except Exception as error:  # more than the device has
            print(f"  {choice}: {type(error).__name__}")
    return timed


def tune(tuned: Tuned, like: Tensor) -> list[list[Any]]:
    """The kernel's rows for the device of `like`."""
    rows: list[list[Any]] = []
    for largest, workload in tuned.buckets:
        now = tiles.tile(tuned.kernel, like, largest or 2**30)
        candidates = [c for c in tuned.candidates if largest is None or c["BLOCK"] <= max(largest, 256)]
        timed = try_all(tuned.kernel, candidates if now in candidates else [now, *candidates], workload())
        choice = best(now, timed)
        times = [(t, c) for c, t in timed]
        print(f"{tuned.kernel:30} up to {largest or 'any':>6}: {choice}{'' if choice == now else f', before {now}'}")
        for t, c in sorted(times, key=lambda pair: pair[0])[:4]:
            print(f"{'':30} {1e6 * t:10.1f} us  {c}")
        rows.append([largest, choice])
        torch.cuda.empty_cache()
    return rows


def write(path: Path, table: dict[str, Any]) -> None:
    """One line a kernel."""
    lines = ",\n".join(f"  {json.dumps(kernel)}: {json.dumps(table[kernel])}" for kernel in sorted(table))
    path.write_text(f"{{\n{lines}\n}}\n")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench tune", description=__doc__)
    parser.add_argument("--only", default="", help="some of " + ",".join(t.kernel for t in TUNED))
    parser.add_argument("--dry", action="store_true", help="print, but leave the table")
    parser.add_argument("--out", type=Path, default=TABLE, help="the table to change; the sources', not the installed copy")
    arguments = parser.parse_args(list(argv))
    if not torch.cuda.is_available():
        print("tune: there is no GPU here, and tiles are chosen by their times on one")
        return 2
    wanted = arguments.only.split(",") if arguments.only else [t.kernel for t in TUNED]
    architecture = tiles.architecture_of(torch.cuda.current_device())
    table = json.loads(arguments.out.read_text())
    like = torch.empty(0, device="cuda")
    for tuned in TUNED:
        if tuned.kernel in wanted:
            table[tuned.kernel][architecture] = tune(tuned, like)
            if not arguments.dry:
                write(arguments.out, table)
    return 0
