"""Memory of a process and time of a step for every layout of a model over so many GPUs, computed before anything runs.

The memory is that of this trainer's own tensors, item by item as `Memory` lists them; `tests/training/test_plan.py` holds it
against small runs. The time is an estimate from the constants of `GPU`, none of which was measured here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from ..models import DecoderConfig
from ..ops.paged_attention import BLOCK
from ..parallel import Stages
from ..parallel.pipeline import bubble, schedule
from .shards import BUCKET


@dataclass(frozen=True)
class GPU:
    """Bytes, and flops and bytes a second of one device as its maker states them, and the shares of them that the estimate
    expects: `mfu` of matrix products in training, `reach` of the memory's and the links' rates. `latency`: seconds of a small
    exchange among tp."""

    memory: int
    flops: float
    bandwidth: float
    link: float
    network: float
    mfu: float = 0.4
    reach: float = 0.6
    latency: float = 1.5e-5
    reserve: float = 0.08
    """The share of the memory that is left to the driver, NCCL and fragmentation."""


GPUS = {
    "a100-40": GPU(40 * 2**30, 312e12, 1.55e12, 300e9, 25e9),
    "a100": GPU(80 * 2**30, 312e12, 2.0e12, 300e9, 25e9),
    "h100": GPU(80 * 2**30, 989e12, 3.35e12, 450e9, 50e9),
    "h200": GPU(141 * 2**30, 989e12, 4.8e12, 450e9, 50e9),
    "b200": GPU(180 * 2**30, 2250e12, 8.0e12, 900e9, 50e9),
}
WORKSPACE = 256 << 20
"""Bytes that the fused head takes on a GPU (`ops.linear_logprobs`)."""
CACHE = 2**31
"""Bytes that the engine's cache has at most where its size is not given."""
NODE = 8
"""GPUs that the fast links join; tp beyond them goes over the network."""


@dataclass(frozen=True)
class Job:
    """What runs: the algorithm, the sequences of a step, and how they are cut.

    minibatch: sequences of an optimizer's step; None is all. epochs: passes over them. cache_tokens: as engine.cache_tokens.
    rewards: models that score completions.
    """

    algorithm: str = "ppo"
    completions: int = 512
    prompt_tokens: int = 512
    completion_tokens: int = 512
    micro_batch_tokens: int = 8192
    minibatch: int | None = None
    epochs: int = 1
    max_sequences: int = 256
    cache_tokens: int | None = None
    rewards: tuple[DecoderConfig, ...] = ()
    checkpointing: bool = True
    interleave: int = 1
    itemsize: int = 2  # of the weights; 4: float32, which needs no copies
    packed_evenly: bool = True  # sequences of a micro-batch have about one length
    sequence_parallel: bool = True
    reshard: bool = True  # as parallel.reshard; where that does not fit a plan is made without
    gloo: bool = False  # on CPUs: gloo copies what it reduces, which NCCL does not; the fused head needs no work space

    @property
    def trained(self) -> int:
        """Models that learn."""
        return 2 if self.algorithm == "ppo" else 1

    @property
    def frozen(self) -> int:
        """Models that do not: the reference."""
        return 1 if self.algorithm in ("ppo", "grpo") else 0

    @property
    def generates(self) -> bool:
        return self.algorithm in ("ppo", "grpo")

    @property
    def context(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def updates(self) -> int:
        """Steps of each optimizer."""
        return self.epochs * math.ceil(self.completions / (self.minibatch or self.completions))


class Weights(NamedTuple):
    """Elements of one process's stages: all, and of its largest parameter."""

    total: int
    largest: int


def layer_weights(c: DecoderConfig, tp: int) -> int:
    d, h, f = c.head_dim, c.hidden_size, c.intermediate_size
    q, kv = c.num_attention_heads * d, c.num_key_value_heads * d
    matrices = (h * (q + 2 * kv) + q * h + 3 * h * f) // tp
    biases = (q + 2 * kv) // tp * c.qkv_bias + h * c.output_bias + (2 * f // tp + h) * c.mlp_bias
    return matrices + biases + 2 * h + 2 * d * c.qk_norm


def weights_of_rank(c: DecoderConfig, stages: Stages, rank: int, tp: int, head: bool = True) -> Weights:
    """Of the policy; without `head` those of a critic's decoder and its scalar head."""
    layers = sum(len(r) for r in stages.of_rank(rank))
    h, table = c.hidden_size, c.vocab_size * c.hidden_size // tp
    first, last = rank == 0, rank == stages.pp - 1
    tied_here = c.tie_word_embeddings and first
    tables = first + (last and head and not tied_here)
    d = c.head_dim
    fused = max(2 * h * c.intermediate_size, h * (c.num_attention_heads + 2 * c.num_key_value_heads) * d) // tp
    total = layers * layer_weights(c, tp) + tables * table + last * h + (0 if head else last * h)
    return Weights(total, max(fused, table if tables else 0))


@dataclass(frozen=True)
class Plan:
    """One layout. `memory`: bytes of the fullest process by item; `peak`: its most at one time, in training or generation.
    `reshard`: what parallel.reshard must be for it."""

    tp: int
    pp: int
    dp: int
    memory: dict[str, float]
    peak: float
    fits: bool
    bubble: float
    seconds: float
    reshard: bool

    @staticmethod
    def parameters(c: DecoderConfig) -> int:
        return weights_of_rank(c, Stages(c.num_hidden_layers), 0, 1).total

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def layouts(
    c: DecoderConfig, gpus: int, interleave: int = 1, rewards: Sequence[DecoderConfig] = ()
) -> Iterator[tuple[int, int, int]]:
    """Every (tp, pp, dp) that the models can be cut into."""
    models = (c, *rewards)
    widths = [w for m in models for w in (m.num_attention_heads, m.num_key_value_heads, m.vocab_size, m.intermediate_size)]
    for tp in range(1, gpus + 1):
        if gpus % tp or any(w % tp for w in widths):
            continue
        for pp in range(1, gpus // tp + 1):
            chunks = interleave if pp > 1 else 1
            if (gpus // tp) % pp == 0 and pp * chunks <= min(m.num_hidden_layers for m in models):
                yield tp, pp, gpus // (tp * pp)


def plans(c: DecoderConfig, gpus: int, gpu: GPU, job: Job) -> list[Plan]:
    """Every legal layout, the quickest of those that fit first."""
    found = [plan(c, tp, pp, dp, gpu, job) for tp, pp, dp in layouts(c, gpus, job.interleave, job.rewards)]
    return sorted(found, key=lambda p: (not p.fits, p.seconds, p.peak))


def plan(c: DecoderConfig, tp: int, pp: int, dp: int, gpu: GPU, job: Job) -> Plan:
    if job.reshard and pp > 1 and job.generates:
        resharded = _plan(c, tp, pp, dp, gpu, job)
        return resharded if resharded.fits else _plan(c, tp, pp, dp, gpu, replace(job, reshard=False))
    return _plan(c, tp, pp, dp, gpu, job)


def _plan(c: DecoderConfig, tp: int, pp: int, dp: int, gpu: GPU, job: Job) -> Plan:
    stages = Stages(c.num_hidden_layers, pp, job.interleave if pp > 1 else 1)
    per_rank = [memory_of_rank(c, stages, rank, tp, dp, job) for rank in range(pp)]
    fullest = max(per_rank, key=peak_of)
    peak = peak_of(fullest)
    count = micro_batches(job, pp, dp, job.minibatch)  # the pipeline drains at every step of an optimizer
    waits = bubble(pp, stages.interleave, count) if pp > 1 else 0.0
    seconds = step_seconds(c, tp, pp, dp, gpu, job, waits)
    fits = peak <= gpu.memory * (1 - gpu.reserve)
    return Plan(tp, pp, dp, fullest, peak, fits, waits, seconds, job.reshard)


def micro_batches(job: Job, pp: int, dp: int, sequences: int | None = None) -> int:
    """Of one replica's part of so many sequences, None for all; no fewer than a pipeline has stages where there are as many."""
    own = max(1, math.ceil((sequences or job.completions) / dp))
    return max(math.ceil(own * job.context / job.micro_batch_tokens), min(pp, own))


class Cache(NamedTuple):
    """Of a process's engine: bytes, and the sequences that it draws at once."""

    bytes: float
    batch: int


def cache_of(c: DecoderConfig, stages: Stages, tp: int, dp: int, job: Job) -> Cache:
    """As `EmbeddedEngine` makes it for a replica's share; a batch that all comes to its full length must fit."""
    pp, d = stages.pp, c.head_dim
    layers = c.num_hidden_layers if job.reshard else max(sum(map(len, stages.of_rank(r))) for r in range(pp))
    position = layers * (c.num_key_value_heads // tp) * (d + 16 * math.ceil(d / 16)) * job.itemsize
    share = math.ceil(job.completions / (dp * (pp if job.reshard else 1)))
    room = min(share, job.max_sequences) * (job.context + BLOCK)
    wanted = job.cache_tokens or max(min(room, CACHE // position), job.context + BLOCK)
    positions = wanted // BLOCK * BLOCK
    return Cache(float(positions * position), max(1, min(share, job.max_sequences, positions // job.context)))


def memory_of_rank(c: DecoderConfig, stages: Stages, rank: int, tp: int, dp: int, job: Job) -> dict[str, float]:
    """Bytes by item.

    weights: of all models, in the dtype of the weights. optimizer: float32 copies and two moments of the rows that this dp
    rank steps. gradients: float32, of the one model that learns at a time. buffers: of the exchange between dp ranks and of
    the largest gradient before it is added. activations: what the micro-batches in flight keep. engine: the key-value cache.
    refit: the other stages' weights while a pipeline generates. scoring: a micro-batch through a model without a backward.
    """
    s, pp = job.itemsize, stages.pp
    policy = weights_of_rank(c, stages, rank, tp)
    critic = weights_of_rank(c, stages, rank, tp, head=False)
    learning = [policy] if job.algorithm in ("sft", "grpo") else [critic] if job.algorithm == "reward" else [policy, critic]
    rewards = [
        weights_of_rank(m, Stages(m.num_hidden_layers, pp, stages.interleave), rank, tp, head=False) for m in job.rewards
    ]
    held = [*learning, *[policy] * job.frozen, *rewards]
    own = max(w.total for w in learning)
    copies = 4 if s != 4 else 0
    bucket = min(BUCKET + max(w.largest for w in learning), own)
    # at the step: the share's gradients beside all of them, and one bucket packed; while adding up: one raw gradient
    exchange = 4.0 * own / dp + 4 * bucket * (1 + job.gloo) if dp > 1 else 0.0
    raw = s * max(w.largest for w in learning) if s != 4 else 0
    whole = weights_of_rank(c, Stages(c.num_hidden_layers), 0, tp).total
    return {
        "weights": float(s * sum(w.total for w in held)),
        "optimizer": (8 + copies) * sum(w.total for w in learning) / dp,
        "gradients": 4.0 * own,
        "buffers": float(max(exchange, raw)),
        "activations": activations(c, stages, rank, tp, dp, job),
        "engine": cache_of(c, stages, tp, dp, job).bytes if job.generates else 0.0,
        "scoring": scoring(c, tp, dp, pp, job),
        "refit": float(s * max(whole - policy.total, 0)) if job.generates and pp > 1 and job.reshard else 0.0,
    }


def peak_of(memory: dict[str, float]) -> float:
    """Training, the optimizer's step and generation do not happen at once; the cache stays."""
    always = memory["weights"] + memory["optimizer"] + memory["engine"]
    training = memory["gradients"] + memory["activations"]
    return always + max(training, memory["gradients"] + memory["buffers"], memory["scoring"], memory["refit"])


def layer_bytes(c: DecoderConfig, tp: int, s: int, rows_shared: bool) -> float:
    """What the backward of one layer needs for one token, as `models.decoder` computes it."""
    d, h, f = c.head_dim, c.hidden_size, c.intermediate_size
    q = c.num_attention_heads * d / tp
    kv = c.num_key_value_heads * d / tp
    norms = 2.0 * (2 * h * s if s == 4 else 4 * h + 2 * h * s)  # float32: input and output; else the float32 copy as well
    if rows_shared:
        norms /= tp
    grouped = c.num_attention_heads != c.num_key_value_heads
    attention = s * (3 * q + 2 * q + (0 if grouped else q + 2 * kv)) + 4 * c.num_attention_heads / tp
    mlp = 4 * f / tp * s
    return norms + attention + mlp


def activations(c: DecoderConfig, stages: Stages, rank: int, tp: int, dp: int, job: Job) -> float:
    """Of the micro-batches in flight at a pipeline rank, and of the head at the last one."""
    pp, h, s = stages.pp, c.hidden_size, job.itemsize
    count = micro_batches(job, pp, dp, job.minibatch)
    sequences = max(1, math.ceil((job.minibatch or job.completions) / dp))
    tokens = math.ceil(sequences / count) * job.context
    share = job.completion_tokens / job.context
    shared = job.sequence_parallel and tp > 1
    between = h * s / (tp if shared else 1)  # bytes of a row between blocks
    flying = _in_flight(pp, stages.interleave, count, rank)
    layers = sum(len(r) for r in stages.of_rank(rank)) / stages.interleave
    each = layer_bytes(c, tp, s, shared)
    sent = rank < pp - 1  # what the stage made is held too
    kept = flying * (layers * (between if job.checkpointing else each) + between * sent) * tokens
    # a layer that is computed again, gradients on their way through its widest block, rows brought together for tp
    passing = (2 * c.intermediate_size / tp + 3 * h * shared) * s
    working = ((each if job.checkpointing else 0.0) + passing) * tokens
    head = 0.0
    if rank == pp - 1:
        rows = tokens * share
        width = c.vocab_size / tp if job.algorithm != "reward" else 1
        space = 0.0 if job.gloo else min(WORKSPACE, rows * width * 4)
        head = space + width * h * 4 + rows * 2 * h * s + tokens * 2 * h * s  # the weight's gradient is float32
    return kept + max(working, head)  # the head is done when the layers' turn comes


def scoring(c: DecoderConfig, tp: int, dp: int, pp: int, job: Job) -> float:
    """A layer's widest place, without what a backward would keep, for a micro-batch of the whole rollout."""
    if not job.generates:
        return 0.0
    sequences = math.ceil(math.ceil(job.completions / dp) / micro_batches(job, pp, dp))
    widest = max(4 * m.intermediate_size / tp + 4 * m.hidden_size for m in (c, *job.rewards))
    return widest * job.itemsize * sequences * job.context


def _in_flight(pp: int, interleave: int, batches: int, rank: int) -> int:
    """The most chunk forwards of a rank that wait for their backwards."""
    if pp == 1:
        return 1
    flying = most = 0
    for action in schedule(pp, interleave, batches)[rank]:
        flying += 1 if action.forward else -1
        most = max(most, flying)
    return most


def step_seconds(c: DecoderConfig, tp: int, pp: int, dp: int, gpu: GPU, job: Job, waits: float) -> float:
    """2 flops a weight and token forward, 4 backward, 2 more where activations are computed again; scoring by every model
    once; the exchanges of tp behind nothing; generation limited by reading weights and cache or by its products.

    Args:
        waits: the share of an optimizer's step in which a rank of the pipeline waits.
    """
    weights, gpus = Plan.parameters(c), tp * pp * dp
    tokens = job.completions * job.context
    link = gpu.link if tp <= NODE else gpu.network

    def through(m: DecoderConfig, passes: float, sent: float) -> float:
        """All tokens through a model: `passes` of 2 flops a weight, `sent` of rows between the processes of tp."""
        row = m.hidden_size * job.itemsize * 2 * (tp - 1) / tp
        products = passes * 2 * Plan.parameters(m) * tokens / (gpus * gpu.flops * gpu.mfu)
        return products + sent * 2 * m.num_hidden_layers / pp * row * tokens / dp / (link * gpu.reach)

    again = job.checkpointing
    training = job.trained * job.epochs * through(c, 3 + again, 2 + again) / (1 - waits)
    reduce = job.trained * job.updates * 6 * weights / (tp * pp) / (gpu.network * gpu.reach) * (dp > 1)
    if not job.generates:
        return training + reduce
    filled = micro_batches(job, pp, dp) * (job.interleave if pp > 1 else 1)
    scored = [c] * (job.trained + job.frozen) + list(job.rewards)
    scoring = sum(through(m, 1, 1) for m in scored) * (filled + pp - 1) / filled
    stages = Stages(c.num_hidden_layers, pp, job.interleave if pp > 1 else 1)
    sequences = math.ceil(job.completions / (pp * dp if job.reshard else dp))
    batch = cache_of(c, stages, tp, dp, job).batch
    position = 2 * c.num_hidden_layers * c.num_key_value_heads // tp * c.head_dim * job.itemsize
    cached = job.prompt_tokens + job.completion_tokens / 2
    read = (weights * job.itemsize / tp + batch * cached * position) / (gpu.bandwidth * gpu.reach)
    product = 2 * weights * batch / tp / (gpu.flops * gpu.mfu)
    one = max(read, product) + (2 * c.num_hidden_layers * gpu.latency if tp > 1 else 0.0)
    prefill = 2 * weights * sequences * job.prompt_tokens / tp / (gpu.flops * gpu.mfu)
    refit = 2 * weights * job.itemsize / tp / (gpu.network * gpu.reach) if pp > 1 and job.reshard else 0.0
    return training + reduce + scoring + prefill + refit + one * job.completion_tokens * math.ceil(sequences / batch)
