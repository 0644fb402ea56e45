"""Sampling of tokens, with the log-probability under what was sampled from and the set it was cut to."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.sampling import reference
from . import backend as backends
from . import checks, value_checks
from .backend import FLOATS, address, choose, empty, extension, matrix, threads, triton_kernels, with_rows
from .library import Op

_RANGES = (  # name, least, most, whether the least is excluded
    ("temperature", 0.0, math.inf, False), ("top_k", 0.0, math.inf, False),
    ("top_p", 0.0, 1.0, True), ("min_p", 0.0, 1.0, False),
)  # fmt: skip


class Sample(NamedTuple):
    """`tokens` int64 (...); `logprobs` float32 (...); `kept` CSR (indptr (N+1), indices), int64. None where not asked."""

    tokens: Tensor
    logprobs: Tensor | None
    kept: tuple[Tensor, Tensor] | None


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    logprobs: bool = True,
    kept: bool = False,
    backend: str | None = None,
) -> Sample:
    """Draw one token a row from softmax(logits / temperature), cut to the top_k highest, of those to the smallest set
    from the highest whose probability reaches top_p, of those to the ones with at least min_p of the highest's. Ties with
    the last token kept are kept.

    One uniform number a row, from Philox 4x32-10 by (seed, row), or by (seed[row], 0) when each row has its own seed:
    then a row's token does not depend on what else is in the batch.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64 (sampled as float32), last stride 1.
        temperature: >= 0, a number or (...); 0 takes the highest logit, the first of equals, with logprob 0.
        top_k: >= 0, an integer or (...); 0 for no cut.
        top_p: in (0, 1], a number or (...).  min_p: in [0, 1], a number or (...).
        generator: where the seed comes from when none is given; None is torch's default generator. One on a GPU gives each
            row a seed of its own.
        seed: an integer, or int64 (...), one for each row.
        logprobs: whether to return log-probabilities: of the tokens, within the kept set, at the temperature.
        kept: whether to return the kept sets, in the form that `fastrlhf.logprobs` takes.
        backend: "triton", "cpu" or "reference"; None chooses.

    Returns:
        `Sample(tokens, logprobs, kept)`.

    Raises:
        TypeError, ValueError: dtype, shape or device that do not fit, an option outside its range, a row without a
        largest finite logit (on a GPU with FASTRLHF_CHECK=1; without, such a row gives token -1 and logprob NaN).
    """
    checks.logits("logits", logits)
    rows: list[Tensor | None] = [None] * 4
    scalars = [1.0, 0.0, 1.0, 0.0]
    for i, value in enumerate((temperature, top_k, top_p, min_p)):
        if isinstance(value, Tensor):
            rows[i] = _per_row(*_RANGES[i], value, logits)
        elif value != scalars[i]:
            name, low, high, open_low = _RANGES[i]
            checks.number(name, value, low=low, high=high, open_low=open_low)
            if name == "temperature" and value != 0:
                checks.temperature(value)
            if name == "top_k" and not isinstance(value, int):
                raise TypeError(f"top_k: expected an integer, got {type(value).__name__}")
            scalars[i] = float(value)
    seeds = None
    if isinstance(seed, Tensor):
        checks.tensor("seed", seed, (torch.int64,))
        if seed.shape != logits.shape[:-1]:
            raise ValueError(f"seed: expected shape {tuple(logits.shape[:-1])}, one for each row, got {checks.shape_of(seed)}")
        checks.same_device("seed", seed, "logits", logits)
        seeds, seed = seed.reshape(-1).contiguous(), 0
    elif seed is None and generator is not None and generator.device.type != "cpu":  # one number would be waited for
        count = logits.numel() // logits.shape[-1]
        seeds = torch.randint(2**62, (count,), generator=generator, dtype=torch.int64, device=generator.device).to(
            logits.device
        )
        seed = 0
    elif seed is None:
        seed = int(torch.randint(2**62, (), generator=generator, dtype=torch.int64, device="cpu"))
    elif not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed: expected an integer or an int64 tensor, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected a 64-bit integer, got {seed}")
    backend = choose("sample", logits, backend)
    if backend == "reference":
        return _reference(logits, rows, scalars, seeds, seed, logprobs, kept)
    tokens, lp, thresholds, counts = _sample(logits, *rows, seeds, scalars, seed, logprobs, kept, backend)
    if value_checks.wanted(backend):
        value_checks.sampled(tokens)
    if not kept:
        return Sample(tokens, lp if logprobs else None, None)
    indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Sample(tokens, lp if logprobs else None, (indptr, _kept_indices(logits, thresholds, indptr, backend)))


def _per_row(name: str, low: float, high: float, open_low: bool, value: Tensor, logits: Tensor) -> Tensor:
    checks.tensor(name, value, (torch.int32, torch.int64) if name == "top_k" else FLOATS)
    if value.shape != logits.shape[:-1]:
        raise ValueError(f"{name}: expected shape {tuple(logits.shape[:-1])}, one for each row, got {checks.shape_of(value)}")
    checks.same_device(name, value, "logits", logits)
    if (value.is_cpu or backends.CHECK) and not torch.compiler.is_compiling():
        bad = ~((value > low if open_low else value >= low) & (value <= high) & (value < float("inf")))
        if bool(bad.any()):
            i = int(bad.reshape(-1).nonzero()[0, 0])
            raise ValueError(f"{name}: {value.reshape(-1)[i].item()} at flat position {i} is outside its range")
    return value.detach().to(torch.int64 if name == "top_k" else torch.float64).reshape(-1).contiguous()


def _forward(
    logits: Tensor, temperatures: Tensor | None, top_ks: Tensor | None, top_ps: Tensor | None, min_ps: Tensor | None,
    seeds: Tensor | None, scalars: list[float], seed: int, logprobs: bool, kept: bool,
    backend: str,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    x, vocab = with_rows(logits), logits.shape[-1]
    rows, lead = logits.numel() // vocab, logits.shape[:-1]
    tokens = empty(lead, torch.int64, x)
    lp = empty(lead, torch.float32, x) if logprobs else None
    thresholds = empty((rows,), torch.float32, x) if kept else None
    counts = empty((rows,), torch.int64, x) if kept else None
    temperature, top_k, top_p, min_p = scalars
    if backend == "triton":
        triton_kernels("sampling").sample(
            x, temperatures, top_ks, top_ps, min_ps, seeds, temperature=temperature, top_k=int(top_k), top_p=top_p, min_p=min_p,
            seed=seed, tokens=tokens, logprobs=lp, thresholds=thresholds, counts=counts,
        )  # fmt: skip
        return tokens, lp, thresholds, counts
    extension().sample(
        matrix(x), rows, vocab, (temperature, int(top_k), top_p, min_p, seed),
        (address(temperatures), address(top_ks), address(top_ps), address(min_ps), address(seeds)),
        tokens.data_ptr(), address(lp), address(thresholds), address(counts), threads(),
    )  # fmt: skip
    return tokens, lp, thresholds, counts


def _fake(logits: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    logprobs, kept = rest[-3:-1]
    lead, rows = logits.shape[:-1], logits.numel() // logits.shape[-1]
    return (
        logits.new_empty(lead, dtype=torch.int64),
        logits.new_empty(lead, dtype=torch.float32) if logprobs else None,
        logits.new_empty(rows, dtype=torch.float32) if kept else None,
        logits.new_empty(rows, dtype=torch.int64) if kept else None,
    )


_sample = Op(
    "sample",
    "(Tensor logits, Tensor? temperatures, Tensor? top_ks, Tensor? top_ps, Tensor? min_ps, Tensor? seeds, "
    "float[] scalars, int seed, bool logprobs, bool kept, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
)


def _kept_implementation(logits: Tensor, thresholds: Tensor, indptr: Tensor, backend: str) -> Tensor:
    x, vocab = with_rows(logits), logits.shape[-1]
    indices = empty((int(indptr[-1]),), torch.int64, x)  # how many there are is read from the device
    if backend == "triton":
        triton_kernels("sampling").kept_indices(x, thresholds, indptr, indices)
        return indices
    extension().kept_indices(
        matrix(x), logits.numel() // vocab, vocab, thresholds.data_ptr(), indptr.data_ptr(), indices.data_ptr(), threads()
    )
    return indices


_kept_indices = Op(
    "kept_indices",
    "(Tensor logits, Tensor thresholds, Tensor indptr, str backend) -> Tensor",
    _kept_implementation,
    lambda logits, thresholds, indptr, backend: logits.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64),
)


def _reference(
    logits: Tensor, per_row: list[Tensor | None], scalars: list[float], seeds: Tensor | None, seed: int, logprobs: bool,
    kept: bool,
) -> Sample:  # fmt: skip
    x, lead = logits.detach().reshape(-1, logits.shape[-1]), logits.shape[:-1]
    tokens, lps, sets = [], [], []
    for i in range(x.shape[0]):
        if not bool(x[i].max().isfinite()) or bool(x[i].isnan().any()):
            raise ValueError(f"logits: row {i} has no largest finite logit to sample from")
        temperature, top_k, top_p, min_p = (s if t is None else float(t[i]) for s, t in zip(scalars, per_row, strict=True))
        token, lp, keep = reference.sample_row(
            x[i], temperature=temperature, top_k=int(top_k), top_p=top_p, min_p=min_p,
            seed=seed if seeds is None else int(seeds[i]), counter=i if seeds is None else 0,
        )  # fmt: skip
        tokens.append(token)
        lps.append(lp)
        sets.append(keep.nonzero().squeeze(-1))
    cut = None
    if kept:
        counts = torch.tensor([0, *(len(s) for s in sets)], device=x.device)
        cut = (counts.cumsum(0), torch.cat(sets) if sets else counts[:0])
    return Sample(
        torch.tensor(tokens, dtype=torch.int64, device=x.device).reshape(lead),
        torch.tensor(lps, dtype=torch.float32, device=x.device).reshape(lead) if logprobs else None,
        cut,
    )
