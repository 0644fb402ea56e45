"""Compiles every Triton kernel for GPUs that are not here, and says what each takes of a multiprocessor:

    python scripts/ahead_of_time.py [--architectures 80,90,100] [--only logprobs,gae] [--processes 2] [--out FILE]

The public ops are called on small CPU tensors with their launches recorded, not run; a launch then compiles as it would on
a GPU: the same types, constants and divisibility, with the architecture's tiles. Exits with 1 where a kernel does not
compile, or keeps registers in memory without a reason in SPILLS_ALLOWED.

The cases are one or more for each kernel, dtype, kept form, loss kind, reduction, correction, mask type and packing, not
their product: what differs in two ways at once is compiled from the same code."""

from __future__ import annotations

import argparse
import collections
import importlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fastrlhf as f
import torch
import triton
from fastrlhf.kernels.common import launch, tiles
from fastrlhf.kernels.linear_logprobs import triton as linear_logprobs_kernels
from fastrlhf.kernels.logprobs import triton as logprobs_kernels
from fastrlhf.kernels.paged_attention import triton as paged_attention_kernels
from fastrlhf.kernels.sampling import triton as sampling_kernels
from fastrlhf.ops import backend
from fastrlhf.ops.paged_attention import empty_cache
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

RESULTS = Path(__file__).parent.parent / "bench" / "results" / "triton-resources.json"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# kernel: bytes of stack up to which registers in memory do no harm, and why
SPILLS_ALLOWED: dict[str, tuple[int, str]] = {
    "linear_logprobs.triton:_partials": (32, "widths that no 16 divides, as no model has, and float32 on sm_80"),
    "linear_logprobs.triton:_logits": (168, "an odd vocabulary over a width that no 16 divides, on sm_80"),
    "masked_stats.triton:moments_kernel": (8, "one register, of bfloat16 on sm_80 alone"),
    "paged_attention.triton:_attend": (8, "two registers, of groups of four on sm_100 alone; to be looked at on a GPU"),
    "policy_loss.triton:token_kernel": (16, "one loop invariant, to fit one more block of 8 warps on a multiprocessor"),
    "policy_loss.triton:row_kernel": (16, "one or two of a row's scalars, to fit one more block of 8 warps"),
    "preference_loss.triton:preference_kernel": (16, "one scalar of a launch of one program"),
    "sampling.triton:_sample": (16, "up to four of a row's scalars, to fit 64 registers and so 32 warps on a multiprocessor"),
}


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def cu_seqlens(rows: int, total: int) -> Tensor:
    return torch.linspace(0, total, rows + 1).long()


def backward(*outputs: Tensor | None) -> None:
    some = [t for t in outputs if t is not None]
    torch.autograd.backward(some, [torch.ones_like(t) for t in some])


def logprobs() -> None:
    def both(dtype: torch.dtype, vocab: int, entropy: bool, labels: Tensor | None = None, **options: Any) -> None:
        x = leaf(2, vocab, dtype=dtype)
        out = f.logprobs(x, zeros(2, dtype=torch.int64) if labels is None else labels, entropy=entropy, **options)
        backward(*out)

    for dtype in FLOATS:
        both(dtype, 128256, True)
    both(torch.bfloat16, 128256, False)
    for vocab in (200, 4096, 50257):
        both(torch.bfloat16, vocab, False)
    both(torch.float32, 50257, True)
    for dtype in FLOATS[:2]:
        both(dtype, 128256, True, softcap=30.0)
        both(dtype, 128256, True, temperature=torch.ones(2), lse=True)
        both(dtype, 128256, True, kept=zeros(2, 128256, dtype=torch.bool))
        both(dtype, 128256, True, kept=(zeros(3, dtype=torch.int64), zeros(16, dtype=torch.int64)))
        both(dtype, 128256, False, zeros(2, 4, dtype=torch.int32))
        with torch.no_grad():
            f.logprobs(zeros(2, 128256, dtype=dtype), zeros(2, dtype=torch.int64))
            f.logprobs(zeros(2, 33, 128256, dtype=dtype)[:, :-1], zeros(2, 32, dtype=torch.int64), entropy=True)
    rows, results = zeros(4), {name: zeros(4) for name in ("logprobs", "entropy", "lse", "max", "log_sum")}
    shard = {"temperature": 1.0, "ignore_index": -100}
    logprobs_kernels.forward(
        zeros(4, 32064, dtype=torch.bfloat16), rows.long(), None, None, None, None, softcap=0.0, vocab_start=32064,
        **dict.fromkeys(results), partials=zeros(4, 4), **shard,
    )  # fmt: skip
    logprobs_kernels.combine(rows.long(), None, zeros(4, 4, 4), **shard, **results)


def linear_logprobs() -> None:
    for dtype, vocab, width in itertools.product(FLOATS, (128256, 50257), (4096, 1000)):
        f.linear_logprobs(leaf(2, width, dtype=dtype), zeros(vocab, width, dtype=dtype), zeros(2, dtype=torch.int64))
        x, w = zeros(2, width, dtype=dtype), zeros(vocab, width, dtype=dtype)
        linear_logprobs_kernels.logits(x, w, None, zeros(2, dtype=torch.bool))  # as the backward makes them again
    h, w = zeros(2, 1024, dtype=torch.bfloat16), zeros(32000, 1024, dtype=torch.bfloat16)
    f.linear_logprobs(h, w, zeros(2, dtype=torch.int64), bias=w[:, 0].contiguous(), softcap=30.0)
    f.linear_logprobs(h, w, zeros(2, dtype=torch.int32), temperature=torch.ones(2), entropy=True)
    linear_logprobs_kernels.logits(h, w, w[:, 0].contiguous(), zeros(2, dtype=torch.bool))


def kl() -> None:
    for kind in ("k1", "abs", "k2", "k3"):
        backward(f.kl(leaf(4096), zeros(4096), kind=kind))
    backward(f.kl(leaf(4096, dtype=torch.bfloat16), zeros(4096, dtype=torch.bfloat16), straight_through=True, clamp_input=10.0))
    backward(f.kl(leaf(4097), zeros(4097)))


def kl_full() -> None:
    for direction, dtype in itertools.product(("forward", "reverse", "js"), FLOATS[:2]):
        x, y = leaf(2, 128256, dtype=dtype), zeros(2, 128256, dtype=dtype)
        backward(f.kl_full(x, y, direction=direction, mask=zeros(2, dtype=torch.bool)))
    for vocab in (200, 4096, 50257):
        backward(f.kl_full(leaf(2, vocab, dtype=torch.bfloat16), leaf(2, vocab, dtype=torch.bfloat16), direction="reverse"))
    teacher, ids = zeros(2, 100, dtype=torch.bfloat16), zeros(2, 100, dtype=torch.int64)
    backward(f.topk_distill_loss(leaf(2, 128256, dtype=torch.bfloat16), teacher, ids, zeros(2, dtype=torch.bool)).loss)


def gae() -> None:
    x, rows = zeros(4, 4096), zeros(4)
    pack, boundaries = zeros(4096 * 4), cu_seqlens(4, 4096 * 4)
    masks = (None, zeros(4, 4096, dtype=torch.bool), zeros(4, 4096), zeros(4, 4096, dtype=torch.int64))
    for mode, mask in itertools.product(("carry", "zero"), masks):
        f.gae(x, x, mask, mask_mode=mode)
    f.gae(x.bfloat16(), x.bfloat16(), masks[1])
    f.gae(x, x, masks[1], lam=torch.ones(4), bootstrap=rows, whiten=True)
    f.gae(zeros(4, 1001), zeros(4, 1001), zeros(4, 1001, dtype=torch.bool))
    f.gae(pack, pack, pack.bool(), cu_seqlens=boundaries)
    f.discounted_returns(x, masks[1])
    for kind in ("k1", "k3"):
        f.shape_rewards(rows, x, x, masks[1], kl_coef=0.1, kl=kind)
        f.experience(rows, x, x, x, masks[1], kl_coef=0.1, kl=kind)
        f.experience(rows, pack, pack, pack, pack.bool(), kl_coef=0.1, kl=kind, cu_seqlens=boundaries)


def group_advantages() -> None:
    for kind in ("grpo", "dr_grpo", "rloo", "reinforce++"):
        f.group_advantages(zeros(64), zeros(64, dtype=torch.int64), kind=kind)
    f.group_advantages(zeros(64), zeros(64, dtype=torch.int64), kind="opo", lengths=torch.ones(64))


def masked_stats() -> None:
    for dtype, mask_dtype in zip((*FLOATS[:2], torch.float32), (None, torch.bool, torch.float32), strict=True):
        x = leaf(64, 4096, dtype=dtype)
        mask = None if mask_dtype is None else zeros(64, 4096, dtype=mask_dtype)
        f.whiten(x.detach(), mask)
        f.masked_var(x.detach()[:, 1:], None if mask is None else mask[:, 1:])
        backward(f.masked_mean(x, mask), f.masked_var(x, mask), f.whiten(x, mask, shift_mean=False))
        backward(f.masked_mean(x, mask, 0), f.masked_mean(x, mask, 1))
    pack = leaf(4096 * 4)
    backward(f.sequence_logprobs(pack, cu_seqlens=cu_seqlens(4, 4096 * 4), average=True))
    backward(f.sequence_logprobs(leaf(4, 4096), zeros(4, 4096, dtype=torch.bool)))


def policy_loss() -> None:
    kinds = ("ppo", "reinforce", "cispo", "sapo", "gspo", "gmpo")

    def one(kind: str = "ppo", *, extras: bool = False, packed: bool = False, mask: Any = torch.bool, **options: Any) -> None:
        shape = (4096 * 4,) if packed else (4, 4096)
        x = leaf(*shape)
        given = options.pop("advantages", zeros(*shape))
        if extras:
            options = {
                "rollout_logprobs": zeros(*shape), "rollout_correction": "tis", "ref_logprobs": zeros(*shape),
                "kl_coef": 0.1, "entropy": leaf(*shape), "entropy_coef": 0.01,
            } | options  # fmt: skip
        out = f.policy_loss(
            x, zeros(*shape), given, None if mask is None else zeros(*shape, dtype=mask), kind=kind,
            cu_seqlens=cu_seqlens(4, 4096 * 4) if packed else None, **options,
        )  # fmt: skip
        out.loss.backward()

    for kind in kinds:
        one(kind)
        one(kind, reduction="seq-mean-token-sum-norm", packed=True, extras=True)
    for kind in ("ppo", "gspo"):
        one(kind, extras=True)
        one(kind, reduction="seq-mean-token-mean", packed=True)
    levels = ("token", "sequence", "geometric")
    for correction, level in (*itertools.product(("tis",), levels), *itertools.product(("mis", "icepop"), levels[:1])):
        weight = f.RolloutCorrection(correction, level, low=0.5, high=2.0)
        one("ppo", rollout_logprobs=zeros(4, 4096), rollout_correction=weight)
    for reduction in ("token-sum", "seq-mean-token-mean", "seq-mean-token-sum"):
        one("ppo", reduction=reduction)
        one("gspo", reduction=reduction)
    for kind in ("k1", "abs", "k2"):
        one("ppo", ref_logprobs=zeros(4, 4096), kl_coef=0.1, kl=kind)
    one("ppo", advantages=zeros(4))
    one("ppo", mask=None)
    one("ppo", mask=torch.float32, denominator=torch.ones(()))
    one("gspo", advantages=zeros(4), denominator=64.0, mask=torch.int64)
    half = leaf(4, 4000, dtype=torch.bfloat16)
    f.policy_loss(half, half.detach(), half.detach(), None).loss.backward()
    with torch.no_grad():
        f.policy_loss(zeros(4, 1001), zeros(4, 1001), zeros(4, 1001), zeros(4, 1001, dtype=torch.bool))


def value_loss() -> None:
    for reduction in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"):
        for clip in (0.2, None):
            x, old, mask = leaf(4, 4096), zeros(4, 4096), zeros(4, 4096, dtype=torch.bool)
            f.value_loss(x, old, old, mask, clip=clip, reduction=reduction).loss.backward()
        pack = leaf(4096 * 4)
        f.value_loss(
            pack, pack.detach(), pack.detach(), None, reduction=reduction, cu_seqlens=cu_seqlens(4, 4096 * 4), denominator=9.0
        ).loss.backward()


def preference_loss() -> None:
    pairs = [zeros(64) for _ in range(4)]
    rewards = {"chosen_rewards": zeros(64), "rejected_rewards": zeros(64)}
    for kind in ("dpo", "robust", "ipo", "hinge", "rpo_sq", "rpo_fwd_kl", "rpo_bwd_kl", "simpo", "orpo", "kto"):
        references = (None, None) if kind in ("simpo", "orpo") else pairs[2:]
        out = f.preference_loss(leaf(64), leaf(64), *references, kind=kind, **(rewards if kind.startswith("rpo") else {}))
        out.loss.backward()
    f.preference_loss(leaf(64), leaf(64), *pairs[2:], kind="dpo", sft_coef=0.1, chosen_lengths=torch.ones(64)).loss.backward()
    f.reward_loss(leaf(64), leaf(64)).loss.backward()
    for kind in ("margin_bt", "scaled_bt"):
        f.reward_loss(leaf(64), leaf(64), zeros(64), kind=kind).loss.backward()
    f.regression_loss(leaf(4096), zeros(4096)).loss.backward()


def sampling() -> None:
    def one(vocab: int, dtype: torch.dtype, kept: bool = False, **given: Any) -> None:
        x = zeros(2, vocab, dtype=dtype)
        rows = [given.get(name) for name in ("temperatures", "top_ks", "top_ps", "min_ps", "seeds")]
        settings = {name: given.get(name, 0) for name in ("top_k", "min_p", "seed")}
        sets = {"thresholds": zeros(2), "counts": zeros(2, dtype=torch.int64)}
        sampling_kernels.sample(
            x, *rows, temperature=1.0, top_p=given.get("top_p", 1.0), tokens=zeros(2, dtype=torch.int64), logprobs=zeros(2),
            **settings, **(sets if kept else dict.fromkeys(sets)),
        )  # fmt: skip

    for dtype in FLOATS:
        one(128256, dtype)
        one(128256, dtype, kept=True, top_k=50, top_p=0.9, min_p=0.1)
    for vocab in (200, 4096, 50257):
        one(vocab, torch.bfloat16)
        one(vocab, torch.bfloat16, top_p=0.9)
    wide = dict.fromkeys(("temperatures", "top_ps", "min_ps"), zeros(2, dtype=torch.float64))
    one(151936, torch.bfloat16, top_ks=zeros(2, dtype=torch.int64), seeds=zeros(2, dtype=torch.int64), **wide)
    for dtype, vocab in ((torch.float32, 128256), (torch.bfloat16, 128256), (torch.bfloat16, 4096), (torch.bfloat16, 200)):
        sampling_kernels.kept_indices(
            zeros(2, vocab, dtype=dtype), zeros(2), zeros(3, dtype=torch.int64), zeros(9, dtype=torch.int64)
        )


def paged_attention() -> None:
    for dtype, heads, kv_heads, dim in (
        (torch.float32, 4, 4, 32), (torch.bfloat16, 8, 2, 128), (torch.float16, 20, 1, 128), (torch.bfloat16, 2, 1, 256),
    ):  # fmt: skip
        new = [zeros(3, n, dim, dtype=dtype) for n in (heads, kv_heads, kv_heads)]
        caches = empty_cache(4, kv_heads, dim, dtype, torch.device("cpu"))
        paged_attention_kernels.paged_attention(
            *new, zeros(64, dim // 2), zeros(64, dim // 2), *(zeros(3, dtype=torch.int64) for _ in range(2)),
            zeros(2, 3, dtype=torch.int32), *caches, scale=0.1, window=None, out=new[0],
        )  # fmt: skip


CASES: dict[str, Callable[[], None]] = {
    c.__name__: c
    for c in (
        logprobs, linear_logprobs, kl, kl_full, gae, group_advantages, masked_stats, policy_loss, value_loss, preference_loss,
        sampling, paged_attention,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One launch, as the compiler knows it."""

    module: str
    kernel: str
    architecture: int
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[Any, Any], ...]
    divisible: tuple[tuple[int, ...], ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return f"{self.module.removeprefix('fastrlhf.kernels.')}:{self.kernel}"


def variants(case: Callable[[], None], architecture: int) -> Iterator[Variant]:
    """The launches of a case, each as Triton's launcher would specialise it."""
    compiler = make_backend(GPUTarget("cuda", architecture, 32))
    found: list[Variant] = []

    def record(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
        bound, specialized, options = create_function_from_signature(kernel.signature, kernel.params, compiler)(*args, **meta)
        _, signature, constants, attributes = kernel._pack_args(compiler, dict(meta), bound, specialized, options)
        found.append(
            Variant(
                kernel.fn.__module__, kernel.fn.__name__, architecture, tuple(signature.items()), tuple(constants.items()),
                tuple(path for path, known in attributes.items() if known), tuple(sorted(options.items())),
            )
        )  # fmt: skip

    with tiles.chosen_for(f"sm_{architecture}"), launch.recording(record):
        case()
    yield from dict.fromkeys(found)


class Source(ASTSource):  # type: ignore[misc]
    """A kernel whose text is made into IR once, for all architectures: nothing in that depends on them, and it takes as long as
    ptxas does."""

    module: str | None = None

    def make_ir(self, target: Any, options: Any, codegen_fns: Any, module_map: Any, context: Any) -> Any:
        if self.module is None:
            made = super().make_ir(target, options, codegen_fns, module_map, context)
            self.module = str(made)
            return made
        with tempfile.NamedTemporaryFile("w", suffix=".mlir") as file:
            file.write(self.module)
            file.flush()
            made = ir.parse_mlir_module(file.name, context)
        made.context = context
        return made


def compile_all(group: list[Variant]) -> list[dict[str, Any]]:
    """Launches that differ in their architecture alone."""
    first = group[0]
    kernel = getattr(importlib.import_module(first.module), first.kernel)
    attributes = {path: [["tt.divisibility", 16]] for path in first.divisible}
    source = Source(kernel, dict(first.signature), dict(first.constants), attributes)
    return [compile_one(source, variant) for variant in group]


def compile_one(source: Source, variant: Variant) -> dict[str, Any]:
    """Registers a thread, shared memory, stack and spilled bytes; or the error."""
    kernel = source.fn
    row: dict[str, Any] = {"kernel": variant.name, "architecture": f"sm_{variant.architecture}"}
    row["constants"] = {
        kernel.arg_names[path[0]]: value
        for path, value in variant.constants
        if value is not None and kernel.params[path[0]].is_constexpr
    }
    row |= dict(variant.options)
    start = time.perf_counter()
    try:
        target = GPUTarget("cuda", variant.architecture, 32)
        compiled = triton.compile(source, target=target, options=dict(variant.options))
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {error}"[-2000:]}
    row["seconds"] = round(time.perf_counter() - start, 2)
    return row | resources(compiled.asm["cubin"], compiled.asm["ptx"], compiled.metadata.shared)


def resources(cubin: bytes, ptx: str, shared: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        binary, text = Path(directory, "kernel.cubin"), Path(directory, "kernel.ptx")
        binary.write_bytes(cubin)
        text.write_text(ptx)
        report = run(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(binary))
        usage = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
        row = {"registers": usage["REG"], "shared": shared, "stack": max(usage["STACK"], usage["LOCAL"]), "spilled": 0}
        if row["stack"]:
            architecture = re.findall(r"\.target (sm_\w+)", ptx)[0]
            tool = triton.knobs.nvidia.ptxas_blackwell if architecture.startswith("sm_1") else triton.knobs.nvidia.ptxas
            report = run(tool.path, "-v", f"-arch={architecture}", str(text), "-o", str(Path(directory, "again.cubin")))
            row["spilled"] = sum(map(int, re.findall(r"(\d+) bytes spill stores", report)))
    return row


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each kernel and architecture: the most of each resource among its variants."""
    kernels = collections.defaultdict(list)
    for row in rows:
        kernels[row["kernel"], row["architecture"]].append(row)
    lines = []
    for (kernel, architecture), group in sorted(kernels.items()):
        line = {"kernel": kernel, "architecture": architecture, "variants": len(group)}
        most = {k: max(r.get(k, 0) for r in group) for k in ("registers", "shared", "stack", "spilled")}
        lines.append(line | most | {"errors": sum("error" in r for r in group)})
    return lines


def show(lines: list[dict[str, Any]]) -> None:
    names = ("variants", "registers", "shared", "stack", "spilled", "errors")
    print(f"{'kernel':44}{'':8}" + "".join(f"{n:>11}" for n in names))
    for line in lines:
        print(f"{line['kernel']:44}{line['architecture']:8}" + "".join(f"{line[n]:>11}" for n in names))


def save(path: Path, lines: list[dict[str, Any]]) -> None:
    """One line a kernel and architecture."""
    head = json.dumps({"triton": triton.__version__, "spills allowed": SPILLS_ALLOWED})
    table = ",\n".join(f"  {json.dumps(line)}" for line in lines)
    path.write_text(f'{head[:-1]}, "kernels": [\n{table}\n]}}\n')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", default="80,90,100")
    parser.add_argument("--only", default=",".join(CASES), help="some of the default")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None, help=f"by default {RESULTS.name}, where everything is compiled")
    parser.add_argument("--all", action="store_true", help="print every variant")
    arguments = parser.parse_args()
    names, architectures = arguments.only.split(","), [int(a) for a in arguments.architectures.split(",")]
    backend.record_triton_launches()
    backend._default = "triton"
    start = time.perf_counter()
    jobs = [v for name in names for a in architectures for v in variants(CASES[name], a)]
    print(f"{len(jobs)} variants, recorded in {time.perf_counter() - start:.0f} s", flush=True)
    groups: dict[Variant, list[Variant]] = {}
    for job in jobs:
        groups.setdefault(replace(job, architecture=0), []).append(job)
    with ProcessPoolExecutor(arguments.processes) as pool:
        rows = [row for some in pool.map(compile_all, groups.values()) for row in some]
    if arguments.all:
        for row in rows:
            print(json.dumps(row))
    lines = summary(rows)
    show(lines)
    for row in rows:
        if "error" in row:
            print(f"\n{row['kernel']} {row['architecture']} {row['constants']}\n{row['error']}")
    spills = sorted({line["kernel"] for line in lines if line["stack"] > SPILLS_ALLOWED.get(line["kernel"], (0, ""))[0]})
    if spills:
        print(f"\nregisters kept in memory beyond SPILLS_ALLOWED: {', '.join(spills)}")
    print(f"\n{len(rows)} variants in {time.perf_counter() - start:.0f} s, triton {triton.__version__}")
    out = arguments.out or (RESULTS if names == list(CASES) else None)
    if out:
        save(out, lines)
    return 1 if spills or any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
