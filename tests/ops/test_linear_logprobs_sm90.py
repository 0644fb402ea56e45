"""The Hopper kernels of the fused head against the definition in float64: with --kernels cuda, on a Hopper GPU or built for
the host. Tiles are 128 rows, 256 columns and 64 deep; two blocks of 128 rows work together; a vocabulary of more than 128
tiles has parts of several."""

from __future__ import annotations

import pytest
import torch

from bench.linear_head import Grads, Head, available, filled, head
from tests.oracle import assert_accurate, assert_gradient_accurate


@pytest.fixture(autouse=True)
def _kernels(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--kernels") != "cuda" or not available():
        pytest.skip("needs --kernels cuda, and these kernels in the build")


def upstream(rows: int) -> Grads:
    return torch.randn(rows), torch.randn(rows), torch.randn(rows)


def check(h: Head) -> None:
    """Statistics, and gradients from random upstream ones in both dtypes."""
    of = h.statistics()
    leaf64, exact = h.plain(torch.float64)
    leaf32, plain = h.plain(torch.float32)
    for name, a, b, c in zip(("logprobs", "entropy", "lse"), of, exact, plain):
        assert_accurate(a, b, c, name)
    grads = upstream(len(h.hidden))
    wanted, usual = (
        torch.autograd.grad(sum((g.to(o.dtype) * o).nan_to_num(0, 0, 0).sum() for g, o in zip(grads, out)), leaf)[0]
        for leaf, out in ((leaf64, exact), (leaf32, plain))
    )
    found = h.gradient(of, grads, torch.float32)
    assert_gradient_accurate(found, wanted, usual, "gradient")
    assert torch.equal(h.gradient(of, grads), found.bfloat16())
    check_one_product(h, grads, wanted)


def check_one_product(h: Head, grads: Grads, wanted: torch.Tensor) -> None:
    """The exponentials kept and turned into the gradient: each is rounded once more than the gradient itself, the label's not."""
    partials, kept, references = h.exponentials()
    of = h.combined(partials)
    leaf64, exact = h.plain(torch.float64)
    for name, a, b, c in zip(("logprobs", "entropy", "lse"), of, exact, h.plain(torch.float32)[1]):
        assert_accurate(a, b, c, name)
    found = h.gradient_in_place(of, grads, kept, references).double()
    room = kept[:, len(h.weight) :]
    assert room.isnan().all()
    # d = p (constant + slope u), the label's share aside: what p's rounding and u's can do
    x = leaf64.detach() if h.softcap == 0 else h.softcap * torch.tanh(leaf64.detach() / h.softcap)
    T = h.temperature if h.temperatures is None else h.temperatures[:, None]
    log_p = torch.log_softmax(x / T, -1)
    g = [t.double()[:, None].abs() for t in grads]
    weight = log_p.exp() / T * (g[0] + g[2] + g[1] * (1 + (log_p + exact[1].detach()[:, None]).abs()))
    allowed = 2**-8 * weight + 0.51 * 2**-7 * wanted.abs() + 1e-6
    column = h.labels.long() - h.vocab_start
    here = (column >= 0) & (column < len(h.weight)) & (h.labels != h.ignore_index)
    rows = here.nonzero().flatten()
    label_allowed = 0.51 * 2**-7 * wanted[rows, column[rows]].abs() + 1e-5
    assert ((found - wanted).abs()[rows, column[rows]] <= label_allowed).all()
    counted = h.labels != h.ignore_index
    assert ((found - wanted).abs() <= allowed.nan_to_num(0, 0, 0))[counted].all() and (found[~counted] == 0).all()


SHAPES = [
    (1, 1, 1), (1, 1000, 8), (3, 7, 64), (128, 256, 64), (127, 255, 63), (129, 257, 65), (5, 300, 200), (257, 511, 136),
    (300, 1000, 72), (384, 513, 320),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "vocab", "width"), SHAPES)
def test_shapes(rows: int, vocab: int, width: int) -> None:
    h = head(rows, vocab, width)
    if width % 8:  # rows at multiples of 16 bytes, their elements need not be as many
        for name in ("hidden", "weight"):
            t = getattr(h, name)
            wide = torch.full((len(t), width + 8 - width % 8), torch.nan, dtype=t.dtype)
            wide[:, :width] = t
            setattr(h, name, wide[:, :width])
    check(h)


def test_parts_of_several_tiles() -> None:
    """130 tiles, two of them a part."""
    check(head(5, 129 * 256 + 44, 16))


@pytest.mark.parametrize("bias", [torch.float32, torch.bfloat16, torch.float16, None])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7, None])
def test_settings(bias: torch.dtype | None, softcap: float, temperature: float | None) -> None:
    h = head(140, 300, 72, softcap=softcap)
    if bias is not None:
        h.bias = torch.randn(300).to(bias)
    if temperature is None:
        h.temperatures = torch.rand(140, dtype=torch.float64) + 0.5
    else:
        h.temperature = temperature
    h.labels[::7] = h.ignore_index
    check(h)


@pytest.mark.parametrize("offset", [-40.0, 1e4, -1e4])
@pytest.mark.parametrize("vocab", [1, 250, 257, 700])
def test_offsets(offset: float, vocab: int) -> None:
    """A column past the vocabulary must not count as a logit of 0; a common offset must cost no precision. The logits are
    multiples of 1/64: at 1e4 float32 holds them exactly."""
    hidden = torch.randint(-2, 3, (130, 64)) / 8
    weight = torch.randint(-3, 4, (vocab, 64)) / 8
    h = Head(hidden.bfloat16(), weight.bfloat16(), torch.randint(0, vocab, (130,)), bias=torch.full((vocab,), offset))
    of = h.statistics()
    without = Head(h.hidden, h.weight, h.labels)
    for name, a, b in zip(("logprobs", "entropy"), of, without.plain(torch.float64)[1]):
        assert float((a - b.detach()).abs().max()) <= 2e-6, name
    check(h)


def test_masked_vocabulary() -> None:
    """A bias of -inf takes columns out; whole tiles of them, and a label among them."""
    h = head(20, 900, 64, bias=torch.zeros(900))
    h.bias[200:800] = -torch.inf
    h.labels[:] = torch.arange(20)
    h.labels[3] = 500
    of = h.statistics()
    assert of[0][3] == -torch.inf and of[0].isfinite().sum() == 19
    h.labels[3] = 3
    of = h.statistics()
    kept = torch.cat([torch.arange(200), torch.arange(800, 900)])
    rest = Head(h.hidden, h.weight[kept], h.labels)
    for a, b, c in zip(of, rest.plain(torch.float64)[1], rest.plain(torch.float32)[1]):
        assert_accurate(a, b, c)
    gradient = h.gradient(of, upstream(20))
    assert gradient.isfinite().all() and (gradient[:, 200:800] == 0).all()


def test_nan_is_seen() -> None:
    h = head(9, 600, 64)
    h.hidden[4] = torch.nan
    of = h.statistics()
    assert of[0].isnan().nonzero().flatten().tolist() == [4] and of[1].isnan().nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize("start", [0, 5000])
def test_labels(start: int) -> None:
    """At the edges of tiles and of lanes, of other ranks, ignored; int32 and int64."""
    here = [0, 1, 2, 7, 8, 255, 256, 257, 511, 512, 599]
    labels = torch.tensor([*(start + i for i in here), start - 1, start + 600, -100])
    h = head(len(labels), 600, 64, labels=labels, vocab_start=start)
    logits = h.hidden.double() @ h.weight.double().T
    for dtype in (torch.int64, torch.int32):
        h.labels = labels.to(dtype)
        partials = h.partials()
        found = partials[..., 3].amax(0)
        assert (found[len(here) :] == -torch.inf).all()
        for row, column in enumerate(here):
            assert abs(float(found[row]) - float(logits[row, column])) < 1e-5
            assert (partials[:, row, 3] > -torch.inf).sum() == 1


def test_a_row_is_its_own() -> None:
    """The same bits whatever rows come with it: alone, in one block of rows, in two that work together, anywhere."""
    h = head(400, 700, 200)
    whole = h.partials()
    of = h.combined(whole)
    grads = upstream(400)
    gradient = h.gradient(of, grads)
    for rows in (slice(0, 1), slice(3, 4), slice(100, 228), slice(7, 300), slice(1, None)):
        part = h.rows(rows)
        assert torch.equal(part.partials(), whole[:, rows])
        of_rows = tuple(t[rows].clone() for t in of)
        assert torch.equal(part.gradient(of_rows, tuple(g[rows].clone() for g in grads)), gradient[rows])


@pytest.mark.parametrize("count", [0, 1, 128, 129, 256, 300, 390, 1000, -1])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_that_count(count: int, dtype: torch.dtype) -> None:
    """Their number lies on the device. The others' partials stay as they were, their gradient is zero."""
    h = head(390, 300, 64)
    whole = h.partials()
    of, grads = h.combined(whole), upstream(390)
    gradient = h.gradient(of, grads)
    h.row_count = torch.tensor([count], dtype=dtype)
    counted = min(max(count, 0), 390)
    part = h.partials()
    assert torch.equal(part[:, :counted], whole[:, :counted]) and part[:, counted:].isnan().all()
    for out in (filled((390, 304), h.hidden, torch.bfloat16), filled((390, 304), h.hidden)):
        found = h.gradient(of, grads, out=out)
        if out.dtype == torch.bfloat16:
            assert torch.equal(found[:counted], gradient[:counted])
        assert (found[counted:] == 0).all() and out[:, 300:].isnan().all()
    partials, kept, references = h.exponentials()
    assert (partials[:, :counted, 3] == whole[:, :counted, 3]).all() and partials[:, counted:].isnan().all()
    found = h.gradient_in_place(of, grads, kept, references)
    assert found[:counted].isfinite().all() and (found[counted:] == 0).all()


def test_strips() -> None:
    """Columns at a time: the statistics merge to the whole's, the gradient has the whole's bits."""
    h = head(150, 1100, 72, temperature=0.8, softcap=20.0, bias=torch.randn(1100))
    of, grads = h.statistics(), upstream(150)
    strips = [h.columns(start, min(start + 500, 1100)) for start in range(0, 1100, 500)]
    merged = h.combined(torch.cat([s.partials() for s in strips]))
    for a, b, c in zip(merged, h.plain(torch.float64)[1], h.plain(torch.float32)[1]):
        assert_accurate(a, b, c)
    assert torch.equal(torch.cat([s.gradient(of, grads) for s in strips], 1), h.gradient(of, grads))


def test_no_upstream_gradient() -> None:
    """Rows with none, and rows whose label is ignored, get zeros, even where the logits are NaN."""
    h = head(12, 300, 64)
    of = h.statistics()
    g = torch.randn(12)
    g[2] = 0
    h.labels[5] = h.ignore_index
    h.hidden[2], h.hidden[5] = torch.nan, torch.nan
    gradient = h.gradient(of, (g, None, None))
    assert (gradient == 0).all(1).nonzero().flatten().tolist() == [2, 5] and gradient.isfinite().all()


def test_nothing_else_is_written() -> None:
    h = head(130, 300, 64)
    room = filled((2 + 2, 130, 4), h.hidden)
    h.partials(room[1:3])
    assert room[0].isnan().all() and room[3].isnan().all() and not room[1:3].isnan().any()
    for dtype in (torch.float32, torch.bfloat16):
        out = filled((132, 320), h.hidden, dtype)
        h.gradient(h.statistics(), upstream(130), out=out[1:131, 8:])
        assert out[0].isnan().all() and out[131].isnan().all()
        assert out[:, :8].isnan().all() and out[:, 308:].isnan().all() and not out[1:131, 8:308].isnan().any()


def test_what_is_refused() -> None:
    h = head(4, 16, 64)
    with pytest.raises(ValueError, match="hidden: expected rows at multiples of 16 bytes, got a row stride of 63"):
        Head(torch.zeros(4, 63).bfloat16(), h.weight, h.labels).partials()
    with pytest.raises(ValueError, match=r"weight: expected rows at multiples of 16 bytes, got .* 2 bytes past one"):
        Head(h.hidden, torch.zeros(16, 72).bfloat16()[:, 1:65], h.labels).partials()
    with pytest.raises(TypeError, match="hidden: expected bfloat16"):
        Head(h.hidden.float(), h.weight, h.labels).partials()
    with pytest.raises(ValueError, match="grad: expected rows at multiples of 16 bytes, got a row stride of 17"):
        h.gradient(h.statistics(), upstream(4), out=torch.empty(4, 17))
    with pytest.raises(TypeError, match="grad: expected bfloat16 or float32"):
        h.gradient(h.statistics(), upstream(4), torch.float16)


def test_no_rows() -> None:
    h = head(4, 300, 64).rows(slice(0, 0))
    assert h.partials().numel() == 0
    h.gradient(h.statistics(), upstream(0))
