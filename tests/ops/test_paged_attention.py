"""The cache in blocks against attention over the whole sequence, in float64; a token's result is its own."""

from __future__ import annotations

import pytest
import torch
from fastrlhf.ops.paged_attention import BLOCK, empty_cache, paged_attention

WIDTH = 8  # blocks a sequence


class Case:
    """Sequences whose blocks lie in any order, with what was computed before already in the cache."""

    def __init__(self, lengths: tuple[int, ...], heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
        g = torch.Generator(torch.get_default_device()).manual_seed(5)
        self.lengths, self.dim, self.dtype = lengths, dim, dtype
        self.q = [torch.randn(n, heads, dim, generator=g).to(dtype) for n in lengths]
        self.k = [torch.randn(n, kv_heads, dim, generator=g).to(dtype) for n in lengths]
        self.v = [torch.randn(n, kv_heads, dim, generator=g).to(dtype) for n in lengths]
        angles = torch.arange(WIDTH * BLOCK).unsqueeze(1) / 100 ** (torch.arange(dim // 2) / dim)
        self.cos, self.sin = angles.cos(), angles.sin()
        blocks = len(lengths) * WIDTH
        self.table = torch.randperm(blocks, generator=g).to(torch.int32).view(len(lengths), WIDTH)
        self.caches = empty_cache(blocks, kv_heads, dim, dtype, torch.get_default_device())
        for cache in self.caches:
            cache.fill_(float("nan"))  # what was never written must not matter
            if cache is self.caches[1]:
                cache[..., dim:] = 0

    def run(self, spans: list[tuple[int, int, int]], backend: str, **options: object) -> torch.Tensor:
        """spans: (sequence, first position, end)."""
        take = [torch.cat([x[s][a:b] for s, a, b in spans]) for x in (self.q, self.k, self.v)]
        positions = torch.cat([torch.arange(a, b) for _, a, b in spans])
        sequences = torch.cat([torch.full((b - a,), s) for s, a, b in spans])
        return paged_attention(
            *take, self.cos, self.sin, positions, sequences, self.table, *self.caches, backend=backend, **options
        )

    def expected(self, s: int, window: int | None = None) -> torch.Tensor:
        def turn(x: torch.Tensor) -> torch.Tensor:
            c, s_ = self.cos[: len(x), None].double(), self.sin[: len(x), None].double()
            a, b = x.double().chunk(2, -1)
            return torch.cat([a * c - b * s_, b * c + a * s_], -1).transpose(0, 1)

        q, k, v = turn(self.q[s]), turn(self.k[s]), self.v[s].double().transpose(0, 1)
        k, v = (t.repeat_interleave(q.shape[0] // t.shape[0], 0) for t in (k, v))
        n = q.shape[1]
        distance = torch.arange(n).unsqueeze(1) - torch.arange(n)
        hidden = (distance < 0) | (distance >= (window or n))
        return ((q @ k.transpose(-1, -2) * self.dim**-0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1)


@pytest.mark.parametrize("window", [None, 1, 5, 33])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 32), (6, 2, 16), (8, 1, 64), (5, 1, 20), (4, 2, 128), (2, 2, 6)])
def test_chunks_and_steps_equal_attention_over_the_whole(
    backend: str, heads: int, kv_heads: int, dim: int, window: int | None
) -> None:
    case = Case((70, 1, 33, 16), heads, kv_heads, dim, torch.float32)
    got: dict[int, list[torch.Tensor]] = {s: [] for s in range(4)}
    for spans in (
        [(0, 0, 30), (1, 0, 1), (2, 0, 32)],  # prompts
        [(0, 30, 69), (2, 32, 33), (3, 0, 15)],  # a chunk, a step, a prompt
        [(0, 69, 70), (3, 15, 16)],
    ):
        out = case.run(spans, backend, window=window)
        for span, part in zip(spans, out.split([b - a for _, a, b in spans])):
            got[span[0]].append(part)
    for s in range(4):
        torch.testing.assert_close(torch.cat(got[s]).double(), case.expected(s, window), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_caches(backend: str, dtype: torch.dtype) -> None:
    case = Case((40, 7), 4, 2, 32, dtype)
    out = case.run([(0, 0, 40), (1, 0, 7)], backend).double()
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    expected = torch.cat([case.expected(0), case.expected(1)])
    assert (out - expected).abs().max() < 4 * rounding * expected.abs().max()


def test_a_tokens_result_is_its_own_to_the_bit(compiled: str) -> None:
    case = Case((70, 90, 33), 6, 2, 32, torch.float32)
    together = case.run([(0, 0, 70), (1, 0, 90), (2, 0, 33)], compiled).split([70, 90, 33])
    step = 7
    for s in range(3):
        parts = [case.run([(s, at, min(at + step, len(together[s])))], compiled) for at in range(0, len(together[s]), step)]
        assert torch.equal(torch.cat(parts), together[s])
    if compiled != "cpu":
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert torch.equal(case.run([(0, 0, 70), (1, 0, 90), (2, 0, 33)], compiled), torch.cat(together))
    torch.set_num_threads(threads)


@pytest.mark.cpu_only
def test_indices_out_of_range_are_named() -> None:
    case = Case((20, 5), 4, 2, 32, torch.float32)
    with pytest.raises(IndexError, match="block_table: 99 in row 0, the cache has 16 blocks"):
        case.table[0, 1] = 99
        case.run([(0, 0, 20)], "cpu")
    one = torch.tensor([0])
    new = (case.q[0][:1], case.k[0][:1], case.v[0][:1], case.cos, case.sin)
    with pytest.raises(IndexError, match="sequences: 2 at 0, the block table has 2 rows"):
        paged_attention(*new, one, one + 2, case.table, *case.caches)
    with pytest.raises(IndexError, match="positions: 128 at 0"):
        paged_attention(*new, one + 128, one, case.table, *case.caches)


def test_bad_input_is_named() -> None:
    case = Case((20, 5), 4, 2, 32, torch.float32)
    one = torch.tensor([0])
    new = (case.q[0][:1], case.k[0][:1], case.v[0][:1], case.cos, case.sin)
    with pytest.raises(TypeError, match=r"block_table: expected torch\.int32, got torch\.int64"):
        paged_attention(*new, one, one, case.table.long(), *case.caches)
    with pytest.raises(ValueError, match="window: expected >= 1, got 0"):
        paged_attention(*new, one, one, case.table, *case.caches, window=0)
    with pytest.raises(ValueError, match=r"k_cache, v_cache: expected \(blocks, 2, 32, 16\)"):
        paged_attention(*new, one, one, case.table, case.caches[0][:, :1], case.caches[1])
