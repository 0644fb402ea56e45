"""How many times a Triton kernel compiles for calls that differ in lengths alone, from recorded launches; nothing runs."""

from __future__ import annotations

import collections
import re

import fastrlhf as f
import pytest
import torch

from tests.oracle import INTERPRETED

triton = pytest.importorskip("triton")

from fastrlhf.kernels.common import launch, tiles  # noqa: E402
from fastrlhf.ops import backend as backends  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels that are interpreted have no variants")
LENGTHS = (1, 2, 7, 15, 16, 17, 32, 33, 64, 100, 240, 255)
LONG = (257, 300, 1024, 4096, 4097)


@pytest.fixture
def launches(monkeypatch):
    """(kernel, arguments as the compiler takes them) of what is launched."""
    monkeypatch.setattr(backends, "_recorded", True)
    monkeypatch.setattr(backends, "_default", "triton")
    backends._obstacle.cache_clear()
    target = make_backend(GPUTarget("cuda", 90, 32))
    found = []

    def record(kernel, grid, args, meta):
        bound, key, options = create_function_from_signature(kernel.signature, kernel.params, target)(*args, **meta)
        _, signature, constants, attributes = kernel._pack_args(target, dict(meta), bound, key, options)
        found.append((kernel, f"{key} {options}", ASTSource(kernel, signature, constants, attributes), options))

    with tiles.chosen_for("sm_90"), launch.recording(record):
        yield found
    backends._obstacle.cache_clear()


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


def mask(*shape):
    return zeros(*shape, dtype=torch.bool)


CALLS = {
    "gae": lambda T: f.gae(zeros(4, T), zeros(4, T), mask(4, T)),
    "gae of slices": lambda T: f.gae(zeros(4, T), zeros(4, T + 1)[:, :-1], mask(4, T)),
    "experience": lambda T: f.experience(zeros(4), zeros(4, T), zeros(4, T), zeros(4, T), mask(4, T), kl_coef=0.1, whiten=True),
    "policy_loss": lambda T: f.policy_loss(zeros(4, T, requires_grad=True), zeros(4, T), zeros(4, T), mask(4, T)),
    "policy_loss of slices": lambda T: f.policy_loss(
        zeros(4, T + 1)[:, 1:], zeros(4, T + 1)[:, 1:], zeros(4), mask(4, T + 1)[:, 1:]
    ),
    "gspo": lambda T: f.policy_loss(zeros(4, T), zeros(4, T), zeros(4), mask(4, T), kind="gspo"),
    "value_loss": lambda T: f.value_loss(zeros(4, T, requires_grad=True), zeros(4, T), zeros(4, T), mask(4, T)),
    "kl": lambda T: f.kl(zeros(4, T), zeros(4, T)),
    "sequence_logprobs": lambda T: f.sequence_logprobs(zeros(4, T), mask(4, T)),
    "whiten of slices": lambda T: f.whiten(zeros(4, T + 1)[:, :-1], mask(4, T + 1)[:, 1:]),
    "logprobs of slices": lambda T: f.logprobs(
        zeros(2, T + 1, 257, dtype=torch.bfloat16)[:, :-1], zeros(2, T, dtype=torch.long)
    ),
    "packed": lambda T: f.policy_loss(zeros(T), zeros(T), zeros(T), mask(T), cu_seqlens=torch.tensor([0, T])),
}


@pytest.mark.parametrize("name", CALLS)
def test_lengths_compile_two_variants_at_the_most(launches, name):
    """Those whose lengths and row strides are multiples of 16, and the rest (kernels/common/triton_tokens.py)."""
    for lengths in (LENGTHS, LONG):  # rows of few tokens have a kernel of their own
        launches.clear()
        for T in lengths:
            CALLS[name](T)
        keys = {(kernel.fn.__name__, key) for kernel, key, *_ in launches}
        counts = collections.Counter(kernel for kernel, _ in keys)
        assert counts and max(counts.values()) <= 2, counts


def test_a_columns_offset_has_64_bits(launches):
    """(T - 1) times a column stride may pass 2^31 where T does not."""
    x = zeros(2, 64, 3)[:, :, 1]
    f.policy_loss(x, x, x, None)
    source, options = launches[0][2:]
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(options)).asm["ttir"]
    assert re.search(r"muli .*tensor<\d+xi64>", text) and not re.search(r"muli .*tensor<\d+xi32>", text)
