from __future__ import annotations

import itertools

import fastrlhf
import pytest
import torch
from fastrlhf.kernels.common import launch
from fastrlhf.kernels.logprobs import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle import EXAMPLES, INTERPRETED, assert_accurate, assert_gradient_accurate

# the last two cross tiles and the chunks of a backward with and without vectors
VOCABS = [1, 2, 127, 128, 129, 1000, 4095, 4097, *((16416, 16411) if INTERPRETED else (32000, 50257))]
LARGE_VOCABS = [128256] if INTERPRETED else [128256, 151936, 262144]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(kind: str, rows: int, vocab: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(rows, vocab)
    if kind == "peaked":
        x = x * 3
        x[:, 0] += 25
    elif kind == "shifted":
        x = x + torch.tensor([1e4, -1e4, 12345.0])[torch.arange(rows) % 3].unsqueeze(1)
    elif kind == "uniform":
        x = torch.zeros(rows, vocab) + 0.5
    elif kind == "masked":
        x = x * 5
        x[torch.rand(rows, vocab) < 0.7] = -torch.inf
        x[:, -1] = 1.0
    elif kind == "rising":  # every block raises the maximum
        x = torch.linspace(-50, 50, vocab).repeat(rows, 1)
    elif kind == "finfo_min":  # the additive masks of attention code
        x[:, : vocab // 2] = torch.finfo(dtype).min
    return x.to(dtype)


KINDS = ["normal", "peaked", "shifted", "uniform", "masked", "rising", "finfo_min"]


def everything(logits, labels, backend=None, **options):
    return fastrlhf.logprobs(logits, labels, entropy=True, lse=True, backend=backend, **options)


def check(logits, labels, backend, **options):
    """Forward and backward with random upstream gradients on all three outputs."""
    ours_in = logits.detach().clone().requires_grad_()
    ours = everything(ours_in, labels, backend, **options)
    wide_options = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()}
    oracle_in = logits.detach().double().requires_grad_()
    oracle = reference.logprobs(oracle_in, labels, **wide_options)
    plain_in = logits.detach().float().requires_grad_()
    plain = reference.logprobs(plain_in, labels, **options)
    for name, a, b, c in zip(("logprobs", "entropy", "lse"), ours, oracle, plain, strict=True):
        assert a.dtype == torch.float32
        assert_accurate(a, b, c, name)
    upstream = [torch.randn_like(a) for a in ours]
    # a label at -inf has an infinite log-prob, whose upstream gradient is finite all the same
    torch.autograd.backward(ours, upstream)
    torch.autograd.backward(oracle, [u.double() for u in upstream])
    torch.autograd.backward(plain, upstream)
    assert ours_in.grad.dtype == logits.dtype
    assert_gradient_accurate(ours_in.grad, oracle_in.grad, plain_in.grad, "gradient")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_oracle(backend, kind, dtype):
    if kind == "shifted" and dtype == torch.float16:
        pytest.skip("1e4 + x has no fraction in float16: covered by the uniform case")
    for vocab in VOCABS:
        logits = inputs(kind, 3, vocab, dtype)
        labels = torch.randint(0, vocab, (3,))
        check(logits, labels, backend)


@pytest.mark.parametrize("vocab", LARGE_VOCABS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_vocabularies(compiled, vocab, dtype):
    for kind in ("normal", "peaked", "masked"):
        check(inputs(kind, 2, vocab, dtype), torch.randint(0, vocab, (2,)), compiled)


@pytest.mark.parametrize("rows", [0, 1, 3, 17 if INTERPRETED else 1000])
def test_row_counts(backend, rows):
    logits, labels = torch.randn(rows, 129), torch.randint(0, 129, (rows,))
    out = everything(logits, labels, backend)
    assert [t.shape for t in out] == [(rows,)] * 3
    x = logits.clone().requires_grad_()
    everything(x, labels, backend).logprobs.sum().backward()
    assert x.grad.shape == logits.shape
    if rows:
        check(logits, labels, backend)


@pytest.mark.float64
def test_float64_is_computed_in_float64(backend):
    logits, labels = torch.randn(4, 3000, dtype=torch.float64) * 4, torch.randint(0, 3000, (4,))
    ours, oracle = everything(logits, labels, backend), reference.logprobs(logits, labels)
    for a, b in zip(ours, oracle, strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"softcap": 5.0}, {"temperature": 2.0, "softcap": 3.0}])
@pytest.mark.float64
def test_gradcheck(backend, options):
    logits, labels = torch.randn(3, 11, dtype=torch.float64, requires_grad=True), torch.tensor([0, -100, 7])
    options = dict(options, kept=torch.rand(3, 11) < 0.6)
    for name in range(3):
        assert torch.autograd.gradcheck(lambda x, i=name: everything(x, labels, backend, **options)[i], logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 30.0, 2.5])
def test_temperature_and_softcap(backend, dtype, softcap):
    logits, labels = torch.randn(6, 4500).mul(8).to(dtype), torch.randint(0, 4500, (6,))
    for temperature in (0.3, 1.7, torch.rand(6) + 0.5):
        check(logits, labels, backend, temperature=temperature, softcap=softcap)


def test_tiny_and_huge_temperatures(backend):
    logits, labels = torch.randn(2, 300) * 3, torch.randint(0, 300, (2,))
    for temperature in (1e-3, 1e4, 1e-7, 1e-10, 1e-20, 1e20):  # the range that is documented
        ours = everything(logits, labels, backend, temperature=temperature)
        oracle = reference.logprobs(logits.double(), labels, temperature=temperature)
        for a, b in zip(ours, oracle, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=3e-6, atol=3e-6)


def test_a_common_offset_costs_nothing(backend):
    logits = (torch.randn(5, 3000) * 64).round() / 64
    labels = torch.randint(0, 3000, (5,))
    for temperature, offset in itertools.product((1.0, 0.7), (1e4, -12345.0)):
        plain = everything(logits, labels, backend, temperature=temperature)
        moved = everything(logits.double().add(offset).float(), labels, backend, temperature=temperature)
        exact = reference.logprobs(logits.double().add(offset).float().double(), labels, temperature=temperature)
        assert float((moved.logprobs - exact[0]).abs().max()) < 2e-6
        assert float((moved.entropy - exact[1]).abs().max()) < 4e-6
        if offset == 1e4:  # float32 at 1e4 keeps 1/1024: the logits are multiples of 1/64, so nothing was rounded
            torch.testing.assert_close(moved.logprobs, plain.logprobs, rtol=0, atol=2e-6)


def test_huge_logits(backend):
    """x / T * log2(e) leaves the float range; the differences do not."""
    top = torch.finfo(torch.float32).max / 2
    logits = torch.full((2, 50), -top)
    logits[0, 3] = top
    labels = torch.tensor([3, 4])
    out = everything(logits, labels, backend)
    torch.testing.assert_close(out.logprobs, torch.tensor([0.0, -torch.log(torch.tensor(50.0))]))


def test_permuting_the_vocabulary(backend):
    logits, labels = torch.randn(4, 5000), torch.randint(0, 5000, (4,))
    order = torch.randperm(5000)
    ours, moved = (
        everything(logits, labels, backend),
        everything(logits[:, order].contiguous(), order.argsort()[labels], backend),
    )
    for a, b in zip(ours, moved, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-6)


def test_padding_the_vocabulary_with_minus_infinity(backend):
    """Columns past V must not count as logits of 0 (verl #2656): with low logits that error is tens of nats."""
    for vocab in (1, 127, 1000, 4097):
        logits, labels = torch.randn(4, vocab) - 40, torch.randint(0, vocab, (4,))
        padded = torch.cat([logits, torch.full((4, 777), -torch.inf)], -1)
        for a, b in zip(everything(logits, labels, backend), everything(padded, labels, backend), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_do_not_depend_on_the_batch(compiled, dtype):
    rows = 10 if INTERPRETED else 33
    logits, labels = torch.randn(rows, 5001).to(dtype), torch.randint(0, 5001, (rows,))
    x = logits.clone().requires_grad_()
    whole = everything(x, labels, compiled)
    whole.logprobs.sum().backward()
    again = everything(logits, labels, compiled)
    sizes = [1, 7, rows - 8]
    parts = [everything(p, q, compiled) for p, q in zip(logits.split(sizes), labels.split(sizes), strict=True)]
    for i in range(3):
        assert torch.equal(whole[i], again[i])
        assert torch.equal(whole[i], torch.cat([p[i] for p in parts]))
    y = logits[8:].clone().requires_grad_()
    everything(y, labels[8:], compiled).logprobs.sum().backward()
    assert torch.equal(x.grad[8:], y.grad)


def test_threads_do_not_change_bits(compiled):
    rows = 4 if INTERPRETED else 40
    logits, labels = torch.randn(rows, 6000), torch.randint(0, 6000, (rows,))
    before = torch.get_num_threads()
    results = []
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        results.append(everything(logits, labels, compiled))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_ignored_rows(backend):
    logits = torch.randn(4, 200)
    logits[1] = torch.nan  # never looked at
    labels = torch.tensor([3, -100, 5, -100])
    x = logits.clone().requires_grad_()
    out = everything(x, labels, backend)
    for t in out:
        assert t[1] == 0 and t[3] == 0 and t[0] != 0
    (out.logprobs.sum() + out.entropy.sum() + out.lse.sum()).backward()
    assert torch.equal(x.grad[1], torch.zeros(200)) and torch.equal(x.grad[3], torch.zeros(200))
    assert x.grad[0].abs().sum() > 0
    other = everything(logits, torch.where(labels == -100, 7, labels), backend, ignore_index=7)
    torch.testing.assert_close(other.logprobs, out.logprobs.detach())


@pytest.mark.parametrize("labels_dtype", [torch.int32, torch.int64])
def test_many_labels_in_one_read(backend, labels_dtype):
    logits, labels = torch.randn(2, 3, 300), torch.randint(0, 300, (2, 3, 4), dtype=labels_dtype)
    labels[0, 1] = -100
    labels[1, 2, 0] = -100
    check(logits, labels, backend)
    out = everything(logits, labels, backend)
    assert out.logprobs.shape == (2, 3, 4) and out.entropy.shape == (2, 3)
    for k in range(4):
        single = everything(logits, labels[..., k].contiguous(), backend)
        torch.testing.assert_close(out.logprobs[..., k], single.logprobs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_logits(backend, dtype):
    logits = torch.randn(6, 3000).to(dtype)
    logits[0, 5] = -torch.inf  # the label
    logits[1] = -torch.inf
    logits[2, 7] = torch.inf
    logits[3, 9] = torch.nan
    logits[4, :2999] = -torch.inf
    logits[5, 1000:] = -torch.inf
    labels = torch.tensor([5, 5, 5, 5, 2999, 5])
    out = everything(logits, labels, backend)
    assert out.logprobs[0] == -torch.inf
    assert -2e-7 < out.logprobs[4] <= 0 and 0 <= out.entropy[4] < 2e-7  # the one token there is
    assert out.logprobs[1:4].isnan().all()
    assert out.logprobs[5].isfinite() and out.entropy[[0, 4, 5]].isfinite().all()
    x = logits.clone().requires_grad_()
    y = everything(x, labels, backend)
    (y.logprobs.sum() + y.entropy.sum()).backward()
    assert x.grad[[0, 4, 5]].isfinite().all()
    assert (x.grad[5, 1000:] == 0).all()


@pytest.mark.parametrize("form", ["mask", "csr"])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_kept(backend, form, softcap):
    logits, labels = torch.randn(5, 4321) * 3, torch.randint(0, 4321, (5,))
    keep = torch.rand(5, 4321) < torch.tensor([0.5, 0.01, 0.0, 0.9, 1.0]).unsqueeze(1)
    kept = keep
    if form == "csr":
        counts = keep.sum(-1)
        kept = (torch.cat([counts.new_zeros(1), counts.cumsum(0)]), keep.nonzero()[:, 1])
    check(logits, labels, backend, kept=kept, temperature=0.8, softcap=softcap)
    check(logits.bfloat16(), labels, backend, kept=kept, softcap=softcap)
    full = keep.clone()
    full[torch.arange(5), labels] = True
    oracle = reference.logprobs(logits.double().masked_fill(~full, -torch.inf), labels)
    if softcap is None:
        torch.testing.assert_close(
            everything(logits, labels, backend, kept=kept).logprobs.double(), oracle[0], rtol=1e-6, atol=2e-6
        )
    x = logits.clone().requires_grad_()
    everything(x, labels, backend, kept=kept).logprobs.sum().backward()
    assert (x.grad[~full] == 0).all()


def test_rows_are_read_where_they_lie(backend):
    base = torch.randn(3, 9, 700)
    labels = torch.randint(0, 700, (3, 8))
    view = base[:, :-1]
    a, b = everything(view, labels, backend), everything(view.contiguous(), labels, backend)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    x, y = base.clone().requires_grad_(), base.clone().requires_grad_()
    everything(x[:, :-1], labels, backend).logprobs.sum().backward()
    everything(y[:, :-1].contiguous(), labels, backend).logprobs.sum().backward()
    assert torch.equal(x.grad, y.grad)
    wide = torch.randn(4, 1000)[:, 100:800]  # row stride above V
    check(wide, torch.randint(0, 700, (4,)), backend)
    expanded = torch.randn(1, 700).expand(4, 700)
    assert torch.equal(
        everything(expanded, labels[0, :4], backend).lse, everything(expanded.contiguous(), labels[0, :4], backend).lse
    )
    four = torch.randn(2, 3, 5, 60)[:, :, 1:]
    assert torch.equal(
        everything(four, torch.zeros(2, 3, 4, dtype=torch.long), backend).lse,
        everything(four.contiguous(), torch.zeros(2, 3, 4, dtype=torch.long), backend).lse,
    )
    one = torch.randn(50)
    assert everything(one, torch.tensor(3), backend).logprobs.shape == ()


def test_nothing_is_copied(compiled):
    """Reading a slice in place allocates outputs only."""
    import resource

    logits = torch.randn(8, 33, 50000)[:, :-1]
    labels = torch.randint(0, 50000, (8, 32))
    if compiled == "triton":
        read = []
        with launch.recording(lambda kernel, grid, args, meta: read.append(args[0].data_ptr())):
            fastrlhf.logprobs(logits, labels)
        assert read == [logits.data_ptr()]
        return
    fastrlhf.logprobs(logits, labels)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fastrlhf.logprobs(logits, labels, entropy=True)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 * 32 * 50000 * 4 / 1024 / 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inplace_backward(compiled, dtype):
    logits, labels = torch.randn(4, 5000).to(dtype), torch.randint(0, 5000, (4,))
    labels[2] = -100
    x = logits.clone().requires_grad_()
    everything(x, labels, compiled).logprobs.sum().backward()
    base = logits.clone().requires_grad_()
    z = base * 1
    address = z.data_ptr()
    everything(z, labels, compiled, inplace_backward=True).logprobs.sum().backward()
    assert torch.equal(base.grad, x.grad)
    assert z.data_ptr() == address and torch.equal(z.detach(), x.grad)  # the logits are gone
    used = logits.clone().requires_grad_() * 1
    square = (used * used).sum()
    everything(used, labels, compiled, inplace_backward=True).logprobs.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_per_token_gradients(backend):
    """reduction='none' with its own upstream gradient a token (Liger #968)."""
    logits, labels = torch.randn(6, 99), torch.randint(0, 99, (6,))
    weights = torch.tensor([0.0, 1.0, -2.0, 3.0, 0.5, 1e-3])
    x = logits.clone().requires_grad_()
    (fastrlhf.logprobs(x, labels, backend=backend).logprobs * weights).sum().backward()
    for i in range(6):
        y = logits[i : i + 1].clone().requires_grad_()
        fastrlhf.logprobs(y, labels[i : i + 1], backend=backend).logprobs.sum().backward()
        torch.testing.assert_close(x.grad[i], y.grad[0] * weights[i], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_more_than_2_31_elements(compiled):
    rows, vocab = 8200, 262144  # 4.3 GB of bfloat16; untouched pages stay the zero page
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16)
    logits[-1] = torch.randn(vocab)
    labels = torch.randint(0, vocab, (rows,))
    out = everything(logits, labels, compiled)
    last = reference.logprobs(logits[-1:].double(), labels[-1:])
    torch.testing.assert_close(out.logprobs[-1].double(), last[0][0], rtol=1e-6, atol=1e-6)
    assert torch.allclose(out.logprobs[:-1], torch.tensor(-float(torch.tensor(float(vocab)).log())))


def test_the_gradient_of_a_label_far_into_the_soft_cap(backend):
    """1 - tanh² of a tanh next to -1 or 1: an ulp of tanh is 1e-3 of it."""
    labels = torch.cat([torch.arange(20), torch.arange(57, 77)])
    logits = inputs("rising", len(labels), 77, torch.float32)
    found = []
    for dtype, chosen in ((torch.float32, backend), (torch.float64, "reference"), (torch.float32, "reference")):
        x = logits.to(dtype, copy=True).requires_grad_()
        fastrlhf.logprobs(x, labels, temperature=0.1, softcap=7.0, backend=chosen).logprobs.sum().backward()
        found.append(x.grad)
    assert_gradient_accurate(*found)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    rows=st.integers(0, 5),
    vocab=st.integers(1, 9000),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from([k for k in KINDS if k != "shifted"]),
    temperature=st.sampled_from([1.0, 0.31, 3.0]),
    softcap=st.sampled_from([None, 7.0]),
)
def test_hypothesis(rows, vocab, seed, dtype, kind, temperature, softcap):
    torch.manual_seed(seed)
    logits = inputs(kind, rows, vocab, dtype)
    labels = torch.where(torch.rand(rows) < 0.2, -100, torch.randint(0, vocab, (rows,)))
    check(logits, labels, None, temperature=temperature, softcap=softcap)
