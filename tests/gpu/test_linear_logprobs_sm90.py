"""What only a Hopper GPU can show of its kernels for the fused head: sizes that fill it, graphs, streams, the same bits again."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from bench.linear_head import Grads, Head, available, head, unfilled
from tests.oracle import assert_accurate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def _built() -> Iterator[None]:
    if not available():
        pytest.skip("this build or this GPU has not the Hopper kernels")
    torch.manual_seed(0)
    yield
    torch.cuda.synchronize()  # what went wrong on the device shows in the test that did it


def upstream(rows: int) -> Grads:
    return tuple(torch.randn(rows, device="cuda") for _ in range(3))  # type: ignore[return-value]


def on_device(rows: int, vocab: int, width: int, **options: object) -> Head:
    return head(rows, vocab, width, device="cuda", **options)


def everything(h: Head, grads: Grads) -> list[Tensor]:
    of = h.statistics()
    partials, kept, references = h.exponentials()
    again = h.combined(partials)
    in_place = h.gradient_in_place(again, grads, kept, references)
    return [*of, h.gradient(of, grads), h.gradient(of, grads, torch.float32), *again, in_place]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


SIZES = [(5000, 1000, 512), (1000, 50257, 1024), (300, 128256, 4096), (4111, 32000, 2304), (64, 262144, 1536)]


@pytest.mark.parametrize(("rows", "vocab", "width"), SIZES)
def test_accuracy(rows: int, vocab: int, width: int) -> None:
    """In float64 a few rows at a time. The bar: 2e-6, or twice what float32 products and sums of torch's are off by."""
    h = on_device(rows, vocab, width)
    of, grads = h.statistics(), upstream(rows)
    gradient = h.gradient(of, grads, torch.float32)
    partials, kept, references = h.exponentials()
    again = h.combined(partials)
    in_place = h.gradient_in_place(again, grads, kept, references)
    torch.backends.cuda.matmul.allow_tf32 = False
    for first in (0, rows // 2, rows - 16):
        few = slice(first, first + 16)
        (leaf, exact), (_, plain) = h.rows(few).plain(torch.float64), h.rows(few).plain(torch.float32)
        for name, a, b, c in zip(("logprobs", "entropy", "lse"), of, exact, plain):
            assert_accurate(a[few], b, c, name)
        for name, a, b, c in zip(("logprobs", "entropy", "lse"), again, exact, plain):
            assert_accurate(a[few], b, c, f"{name}, exponentials kept")
        wanted = torch.autograd.grad(sum((g[few] * o).sum() for g, o in zip(grads, exact)), leaf)[0]
        assert_accurate(gradient[few], wanted, wanted.float(), "gradient")
        rounded = float((in_place[few] - wanted).abs().max() / wanted.abs().max())
        assert rounded < 2**-7, rounded  # twice rounded to bfloat16
    assert torch.equal(h.gradient(of, grads), gradient.bfloat16())


@pytest.mark.parametrize(("rows", "vocab", "width"), [(700, 40001, 520), (5000, 1000, 512)])
def test_same_bits(rows: int, vocab: int, width: int) -> None:
    h, grads = on_device(rows, vocab, width), upstream(rows)
    first = everything(h, grads)
    assert all(equal(first, everything(h, grads)) for _ in range(100))


def test_rows_of_any_batch() -> None:
    h = on_device(5000, 3001, 512)
    whole = h.partials()
    for rows in (slice(0, 1), slice(3, 4), slice(100, 228), slice(7, 2500), slice(1, None)):
        assert torch.equal(h.rows(rows).partials(), whole[:, rows]), rows


def fill(h: Head, other: Head) -> None:
    for name in ("hidden", "weight", "labels"):
        getattr(h, name).copy_(getattr(other, name))


def test_graph() -> None:
    """Captured once, replayed on other inputs and another number of rows that count: what eager mode gives for those."""
    count = torch.tensor([600], device="cuda")
    h, other = (on_device(700, 3001, 520, row_count=count, allocate=unfilled) for _ in range(2))
    out, gradient = h.partials(), torch.empty(700, 3008, dtype=torch.bfloat16, device="cuda")
    grads = upstream(700)

    def run() -> None:
        h.gradient(h.combined(h.partials(out)), grads, out=gradient)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    fill(h, other)
    count.fill_(650)
    for _ in range(2):
        out.zero_()
        gradient.fill_(1)
        graph.replay()
        expected = other.partials()
        assert torch.equal(out[:, :650], expected[:, :650]) and (out[:, 650:] == 0).all()
        assert torch.equal(gradient[:650, :3001], other.gradient(other.combined(expected), grads)[:650])
        assert (gradient[650:, :3001] == 0).all()


def test_nothing_waits_for_the_device() -> None:
    h, grads = on_device(300, 3001, 520, allocate=unfilled), upstream(300)
    everything(h, grads)
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything(h, grads)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_current_stream_is_used() -> None:
    right, late = on_device(300, 3001, 520), on_device(300, 3001, 520)
    grads = upstream(300)
    expected = everything(right, grads)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        fill(late, right)
        out = everything(late, grads)
    stream.synchronize()
    assert equal(out, expected)


def test_two_streams_at_once() -> None:
    heads = [on_device(700, 3001, 520) for _ in range(2)]
    grads = upstream(700)
    expected = [everything(h, grads) for h in heads]
    streams = [torch.cuda.Stream() for _ in heads]
    torch.cuda.synchronize()
    for _ in range(20):
        out = []
        for stream, h in zip(streams, heads):
            with torch.cuda.stream(stream):
                out.append(everything(h, grads))
        torch.cuda.synchronize()
        assert all(equal(a, b) for a, b in zip(out, expected))


def extra_bytes(run: Callable[[], object]) -> int:
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = run()
    torch.cuda.synchronize()
    del out
    return torch.cuda.max_memory_allocated() - before


def test_memory() -> None:
    """16 bytes a row and part of the vocabulary."""
    h = on_device(8192, 128256, 512, allocate=unfilled)
    assert extra_bytes(h.statistics) < 20e6
