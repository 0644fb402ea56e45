"""NeMo-RL's seams, read in its sources of the 0.7 line; it cannot be installed from a package index, and the tests run against
functions written from the same contract. What does not agree where it is installed does not go live."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...ops import backend as backends
from ...ops.masked_stats import moments
from ..seam import Call, Host, Seam, Sizes, decline, in_place_of, obstacle
from . import semantics
from .inputs import inputs

MODEL, ALGORITHMS, ADVANTAGE = (
    "nemo_rl.distributed.model_utils",
    "nemo_rl.algorithms.utils",
    "nemo_rl.algorithms.advantage_estimator",
)


@functools.cache
def alone() -> Any:
    """A process group of this process only, without torch.distributed being set up: to call the host's functions with."""
    import torch.distributed

    dist: Any = torch.distributed
    return dist.ProcessGroupGloo(dist.HashStore(), 0, 1)


def shard(logits: Tensor, start: int, end: int, group: Any) -> ops.VocabParallel:
    """Equal shards in rank order, as NeMo-RL cuts them."""
    return ops.VocabParallel(group, start, end, (end - start) * group.size())


def _function(original: Any, name: str, apply: Any) -> Any:
    """In the place of an autograd function: a class with its `apply`."""
    made = type(original.__name__, (), {"__fastrlhf__": True, "apply": staticmethod(apply), "__module__": original.__module__})
    made.__qualname__ = name
    return made


def distributed_logprob(original: Any) -> Any:
    def apply(logits: Tensor, target: Tensor, start: int, end: int, group: Any, inference_only: bool = False) -> Tensor:
        reason = obstacle(logits)
        if reason is not None:
            decline("nemo_rl DistributedLogprob", reason)
            return original.apply(logits, target, start, end, group, inference_only)
        x = logits.detach() if inference_only else logits
        return semantics.logprobs(x, target, dtype=torch.float32, vocab_parallel=shard(logits, start, end, group))

    return _function(original, "DistributedLogprob", apply)


def chunked_distributed_logprob(original: Any) -> Any:
    def apply(
        logits: Tensor, target: Tensor, start: int, end: int, chunk_size: int, group: Any, inference_only: bool = False
    ) -> Tensor:
        reason = obstacle(logits)
        if reason is not None:
            decline("nemo_rl ChunkedDistributedLogprob", reason)
            return original.apply(logits, target, start, end, chunk_size, group, inference_only)
        x = logits.detach() if inference_only else logits
        return semantics.logprobs(x, target, dtype=torch.float32, vocab_parallel=shard(logits, start, end, group))

    return _function(original, "ChunkedDistributedLogprob", apply)


def chunked_distributed_entropy(original: Any) -> Any:
    """NeMo-RL's is Σ p log p: minus the entropy."""

    def apply(logits: Tensor, chunk_size: int, group: Any, inference_only: bool = False) -> Tensor:
        reason = obstacle(logits)
        if reason is not None:
            decline("nemo_rl ChunkedDistributedEntropy", reason)
            return original.apply(logits, chunk_size, group, inference_only)
        x = logits.detach() if inference_only else logits
        return -semantics.entropy(x, dtype=torch.float32, vocab_parallel=semantics.own_shard(x, group))

    return _function(original, "ChunkedDistributedEntropy", apply)


def logprob_calls(chunked: bool) -> Any:
    def calls(sizes: Sizes) -> Iterator[Call]:
        make = inputs(sizes)
        x, y = make.logits(sizes.rows, sizes.length), make.labels(sizes.rows, sizes.length)
        chunk = (5,) if chunked else ()
        loose = None if sizes.dtype == torch.float32 else 2e-2
        yield Call("one rank", (x, y, 0, sizes.vocab, *chunk, alone()), grads=(0,), tolerance=loose)
        yield Call("inference only", (x, y, 0, sizes.vocab, *chunk, alone(), True), tolerance=loose)

    return calls


def entropy_calls(sizes: Sizes) -> Iterator[Call]:
    x = inputs(sizes).logits(sizes.rows, sizes.length)
    yield Call("one rank", (x, 5, alone()), grads=(0,), tolerance=None if sizes.dtype == torch.float32 else 2e-2)


def gae(original: Any) -> Any:
    @in_place_of(original)
    def replacement(
        self: Any, token_level_rewards: Tensor, values: Tensor, mask: Tensor, gae_lambda: Any = None
    ) -> tuple[Tensor, Tensor]:
        reason = semantics.carry_obstacle(token_level_rewards, values, mask)
        if reason is not None:
            decline("nemo_rl _compute_gae", reason)
            return original(self, token_level_rewards, values, mask, gae_lambda)
        lam = self.gae_lambda if gae_lambda is None else gae_lambda
        per_row = isinstance(lam, Tensor) and lam.dim() == 1
        return ops.gae(
            token_level_rewards.detach(), values.detach(), mask, gamma=float(self.gae_gamma),
            lam=lam if per_row else float(lam),
            mask_mode="carry",
        )  # fmt: skip

    return replacement


def gae_calls(sizes: Sizes) -> Iterator[Call]:
    make = inputs(sizes)
    this = types.SimpleNamespace(gae_gamma=0.99, gae_lambda=0.95)
    r, v, m = make.batch(), make.batch(), make.mask()
    yield Call("gaps in the mask", (this, r, v, m), tolerance=1e-4)
    yield Call("a lambda given", (this, r, v, m, 0.5), tolerance=1e-4)
    yield Call("fractions in the mask", (this, r, v, m * 0.5), tolerance=1e-4)
    rows = torch.linspace(0.0, 1.0, sizes.rows).to(sizes.device)
    yield Call("a lambda for each row", (this, r, v, m), {"gae_lambda": rows}, tolerance=1e-4)


def calculate_kl(original: Any) -> Any:
    @in_place_of(original)
    def replacement(
        logprobs: Tensor, logprobs_reference: Tensor, kl_type: str = "k3", input_clamp_value: float | None = 20.0,
        output_clamp_value: float | None = 10.0, importance_sampling_weights: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        reason = obstacle(logprobs, "kl") or obstacle(logprobs_reference, "kl")
        if reason is None and (kl_type not in ("k1", "k2", "k3") or logprobs.shape != logprobs_reference.shape):
            reason = "another type or two shapes"
        if reason is None and importance_sampling_weights is not None:
            reason = "importance weights"
        if reason is None and (logprobs.dtype != torch.float32 or logprobs_reference.dtype != torch.float32):
            reason = "log-probs that are not float32"
        if reason is not None:
            decline("nemo_rl calculate_kl", reason)
            given = (logprobs, logprobs_reference, kl_type, input_clamp_value, output_clamp_value)
            return original(*given, *(() if importance_sampling_weights is None else (importance_sampling_weights,)))
        return ops.kl(
            logprobs, logprobs_reference, kind=kl_type, clamp_input=input_clamp_value, clamp_output=output_clamp_value
        )

    return replacement


def kl_calls(sizes: Sizes) -> Iterator[Call]:
    make = inputs(Sizes(sizes.rows, sizes.length, device=sizes.device))
    a, b, far = make.batch(2.0), make.batch(2.0), make.batch(60.0)
    for kind in ("k3", "k2", "k1"):
        yield Call(kind, (a, b, kind), grads=(0, 1))
        yield Call(f"{kind} where clamps bite", (far, b, kind), grads=(0,))
        yield Call(f"{kind} without clamps", (a, b, kind, None, None), grads=(0,))
    yield Call("an unknown type", (a, b, "k9"), raises=ValueError)


def masked_mean(original: Any) -> Any:
    @in_place_of(original)
    def replacement(values: Any, mask: Any, dim: Any = None, global_normalization_factor: Any = None) -> Tensor:
        reason = semantics.statistics_obstacle(values, mask)
        if reason is not None or not (dim is None or isinstance(dim, int)):
            decline("nemo_rl masked_mean", reason or f"dim {dim}")
            return original(values, mask, dim, global_normalization_factor)
        if global_normalization_factor is None:
            return ops.masked_mean(values, mask, dim)
        return semantics.sums(values, mask, dim) / (global_normalization_factor + 1e-8)

    return replacement


def mean_calls(sizes: Sizes) -> Iterator[Call]:
    make = inputs(Sizes(sizes.rows, sizes.length, device=sizes.device))
    x = make.batch()
    for dtype in (torch.float32, torch.int64):
        yield Call(f"{dtype} mask with gaps", (x, make.mask(dtype)), grads=(0,))
        yield Call(f"{dtype} mask with gaps, dim -1", (x, make.mask(dtype), -1), grads=(0,))
        yield Call("a global count", (x, make.mask(dtype), None, 123.0), grads=(0,))
        yield Call("a global count on the device", (x, make.mask(dtype), None, x.new_tensor(123.0)), grads=(0,))
    yield Call("an empty mask", (x, torch.zeros_like(x)))


def masked_var(original: Any) -> Any:
    @in_place_of(original)
    def replacement(values: Any, mask: Any, mean: Any = None, unbiased: bool = True) -> Tensor:
        reason = semantics.statistics_obstacle(values, mask)
        if reason is not None or (values.requires_grad and torch.is_grad_enabled()):
            decline("nemo_rl masked_var", reason or "a gradient")
            return original(values, mask, mean, unbiased)
        n, middle, m2 = moments(values, mask, backends.choose("masked_var", values, None))
        if mean is not None:
            m2 = m2 + n * (middle - mean) ** 2
        return (m2 / (n - 1 if unbiased else n)).to(values.dtype)

    return replacement


def var_calls(sizes: Sizes) -> Iterator[Call]:
    make = inputs(Sizes(sizes.rows, sizes.length, device=sizes.device))
    x, m = make.batch(), make.mask()
    yield Call("gaps in the mask", (x, m))
    yield Call("its mean given", (x, m, (x * m).sum() / m.sum()))
    yield Call("biased", (x, m), {"unbiased": False})


SEAMS = (
    Seam(
        MODEL, "DistributedLogprob", distributed_logprob, logprob_calls(False), "logprobs", on_import=True,
        function=lambda held: held.apply,
    ),
    Seam(
        MODEL, "ChunkedDistributedLogprob", chunked_distributed_logprob, logprob_calls(True), "logprobs", on_import=True,
        function=lambda held: held.apply,
    ),
    Seam(
        MODEL, "ChunkedDistributedEntropy", chunked_distributed_entropy, entropy_calls, "logprobs", on_import=True,
        function=lambda held: held.apply,
    ),
    Seam(ADVANTAGE, "GeneralizedAdvantageEstimator._compute_gae", gae, gae_calls, "gae", on_import=True),
    Seam(ALGORITHMS, "calculate_kl", calculate_kl, kl_calls, "kl", on_import=True),
    Seam(ALGORITHMS, "masked_mean", masked_mean, mean_calls, "masked_mean", on_import=True),
    Seam(ALGORITHMS, "masked_var", masked_var, var_calls, "masked_var", on_import=True),
)  # fmt: skip
HOST = Host("nemo_rl", "nemo_rl", "nemo-rl", ("0.7", "0.7"), SEAMS)
