from __future__ import annotations

import os

import fastrlhf
import pytest
import torch
from fastrlhf.kernels.linear_logprobs import chunked, reference
from fastrlhf.kernels.logprobs import reference as logprobs_reference

from tests.oracle import INTERPRETED, assert_accurate, assert_gradient_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# rows and columns on both sides of every tile and segment; widths that are no multiple of anything
SHAPES = [(1, 1, 1), (3, 13, 5), (33, 127, 64), (34, 961, 65)] + ([] if INTERPRETED else [(70, 1000, 300), (5, 4097, 130)])


def head(rows: int, vocab: int, width: int, dtype: torch.dtype, scale: float = 2.0):
    hidden = torch.randn(rows, width).to(dtype)
    weight = (torch.randn(vocab, width) * (scale / width**0.5)).to(dtype)
    return hidden, weight, torch.randn(vocab).to(dtype), torch.randint(0, vocab, (rows,))


def everything(hidden, weight, labels, backend=None, **options):
    return fastrlhf.linear_logprobs(hidden, weight, labels, entropy=True, lse=True, backend=backend, **options)


def check(hidden, weight, bias, labels, backend, workspace_bytes=1 << 20, **options):
    """Forward and backward against the float64 oracle of the same rounded inputs, as close as plain float32."""
    wide_options = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()}
    leaves, outs = [], []
    for dtype, function in ((hidden.dtype, None), (torch.float64, wide_options), (torch.float32, options)):
        leaf = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (hidden, weight, bias)]
        if function is None:
            out = everything(leaf[0], leaf[1], labels, backend, bias=leaf[2], workspace_bytes=workspace_bytes, **options)
        else:
            out = reference.linear_logprobs(leaf[0], leaf[1], labels, bias=leaf[2], **function)
        leaves.append(leaf)
        outs.append(out)
    for name, a, b, c in zip(("logprobs", "entropy", "lse"), *outs, strict=True):
        assert a.dtype == torch.float32
        assert_accurate(a, b, c, name)
    upstream = [torch.randn_like(a) for a in outs[0]]
    for out, dtype in zip(outs, (torch.float32, torch.float64, torch.float32), strict=True):
        torch.autograd.backward(out, [u.to(dtype) for u in upstream])
    for name, a, b, c in zip(("hidden", "weight", "bias"), *leaves, strict=True):
        if a is None:
            continue
        assert a.grad.dtype == a.dtype
        if a.dtype == torch.float32 or backend != "gpu":
            assert_gradient_accurate(a.grad, b.grad, c.grad, f"gradient of {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_oracle(backend, dtype, shape):
    hidden, weight, bias, labels = head(*shape, dtype)
    check(hidden, weight, bias, labels, backend)
    check(hidden, weight, None, labels, backend)


@pytest.mark.skipif(INTERPRETED, reason="tiles of the CPU's products")
@pytest.mark.parametrize(("rows", "vocab", "width"), [(2090, 30, 40), (30, 961, 1101)])
def test_more_rows_and_a_wider_head_than_a_product_takes_at_a_time(backend, rows, vocab, width):
    hidden, weight, bias, labels = head(rows, vocab, width, torch.float32)
    check(hidden, weight, bias, labels, backend, workspace_bytes=1 << 28)
    if backend == "cpu":  # d logits in pairs, where the processor multiplies them
        h, w = (t.bfloat16().requires_grad_() for t in (hidden, weight))
        out = everything(h, w, labels, backend, workspace_dtype=torch.bfloat16, workspace_bytes=1 << 28)
        out.logprobs.sum().backward()
        wide = [t.detach().double().requires_grad_() for t in (h, w)]
        reference.linear_logprobs(*wide, labels)[0].sum().backward()
        for a, b in zip((h, w), wide, strict=True):
            torch.testing.assert_close(a.grad.double(), b.grad, rtol=2e-2, atol=2e-2 * float(b.grad.abs().max()))


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"softcap": 3.0}, {"temperature": 1.7, "softcap": 5.0}], ids=str)
def test_temperature_and_softcap(backend, options):
    hidden, weight, bias, labels = head(35, 515, 33, torch.bfloat16)
    check(hidden, weight, bias, labels, backend, **options)
    if "temperature" in options:
        check(hidden, weight, bias, labels, backend, **options | {"temperature": torch.rand(35) + 0.5})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ignored_rows_cost_and_change_nothing(backend, dtype):
    hidden, weight, bias, labels = head(50, 130, 32, dtype)
    labels[torch.rand(50) < 0.6] = -100
    hidden[labels == -100] = torch.nan
    h, w, b = (t.clone().requires_grad_() for t in (hidden, weight, bias))
    out = everything(h, w, labels, backend, bias=b)
    rows = labels != -100
    alone = everything(hidden[rows], weight, labels[rows], backend, bias=bias)
    for a, c in zip(out, alone, strict=True):
        torch.testing.assert_close(a[rows], c, rtol=0, atol=2e-6 if backend == "reference" else 0)
        assert not a[~rows].any()
    sum(x.sum() for x in out).backward()
    for t in (h, w, b):
        assert not t.grad.isnan().any()
    assert not h.grad[~rows].any()
    out = everything(hidden, weight, torch.full_like(labels, -100), backend)
    assert not any(x.any() for x in out)


def test_a_row_does_not_depend_on_its_neighbours(backend):
    if backend not in (None, "cpu", "triton"):
        pytest.skip("multiplies with torch")
    hidden, weight, bias, labels = head(77, 1500, 96, torch.float32)
    whole = everything(hidden, weight, labels, backend, bias=bias)
    for size in (1, 33) if INTERPRETED else (1, 2, 31, 32, 33):
        for at in (0,) if INTERPRETED else (0, 40):  # numpy's product of a tile is no function of its rows alone
            part = everything(hidden[at : at + size], weight, labels[at : at + size], backend, bias=bias)
            for a, b in zip(part, whole, strict=True):
                assert torch.equal(a, b[at : at + size]), size


def test_repeats_are_bitwise_equal_on_any_number_of_threads(compiled):
    hidden, weight, bias, labels = head(40, 2000, 64, torch.bfloat16)
    runs = []
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            out = everything(h, w, labels, compiled, bias=bias)
            (out.logprobs.sum() + out.entropy.sum()).backward()
            runs.append((*out, h.grad, w.grad))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        for a, b in zip(runs[0], run, strict=True):
            assert torch.equal(a, b)


def test_small_workspaces_change_no_log_prob(backend):
    hidden, weight, bias, labels = head(80, 1100, 48, torch.float32)
    results = []
    for workspace in (1, 1 << 16, 1 << 28):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = everything(h, w, labels, backend, bias=bias, workspace_bytes=workspace)
        out.logprobs.sum().backward()
        results.append((out, h.grad, w.grad))
    for out, gh, gw in results[1:]:
        for a, b in zip(out, results[0][0], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=4e-6)
        torch.testing.assert_close(gh, results[0][1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gw, results[0][2], rtol=1e-5, atol=3e-6)


def test_halves_are_summed_in_float32_where_rows_come_in_blocks(compiled):
    hidden, weight, _, labels = head(300, 64, 16, torch.bfloat16)
    exact = [t.double().requires_grad_() for t in (hidden, weight)]
    reference.linear_logprobs(*exact, labels)[0].sum().backward()
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        w = weight.clone().requires_grad_()
        out = fastrlhf.linear_logprobs(hidden, w, labels, workspace_bytes=1 << 12, weight_grad_dtype=dtype, backend=compiled)
        out.logprobs.sum().backward()
        errors[dtype] = float((w.grad - exact[1].grad).abs().max() / exact[1].grad.abs().max())
    # in blocks of rows, each rounded when it is added; the tiles of a GPU take such a vocabulary's rows at once
    assert errors[torch.float32] < 2**-8
    assert errors[torch.float32] <= errors[torch.bfloat16] < 2**-5
    if compiled == "cpu":
        assert errors[torch.bfloat16] > 2 * errors[torch.float32]


def test_offsets_of_the_logits_cost_nothing(backend):
    hidden, weight, _, labels = head(20, 1030, 32, torch.float32)
    bias = torch.full((1030,), 1e4)
    out = everything(hidden, weight, labels, backend, bias=bias)
    exact = logprobs_reference.logprobs((hidden @ weight.T + bias).double(), labels)
    # the logits themselves carry 1e4's rounding, 5e-4: the statistics add nothing to it
    for a, b in zip(out[:2], exact, strict=False):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=4e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_logits_cost_no_digits(backend, dtype):
    """Logits up to 17 over a thousand products each: sums in single precision throughout are off by 3e-6 and more."""
    if backend not in (None, "cpu"):
        pytest.skip("sums of other kernels are in single precision")
    errors = []
    for seed in range(3):
        torch.manual_seed(seed)
        hidden, weight, _, labels = head(64, 8192, 1024, dtype, scale=3.3)
        out = everything(hidden, weight, labels, backend)
        exact = logprobs_reference.logprobs(hidden.double() @ weight.double().T, labels)
        assert exact[0].min() > -32  # beyond it, float32 itself is off by 2e-6
        errors.append([float((a.double() - b).abs().max()) for a, b in zip(out[:2], exact, strict=False)])
    # inputs of 24 bits fill a run of 64 products; those of 8 do not
    assert max(max(e) for e in errors) < (2e-6 if dtype == torch.bfloat16 else 2.5e-6), errors


def test_minus_infinity_and_nan(backend):
    hidden, weight, bias, labels = head(6, 200, 16, torch.float32)
    bias[50:] = -torch.inf
    labels = torch.tensor([0, 1, 2, 3, 49, 60])
    h, w, b = (t.clone().requires_grad_() for t in (hidden, weight, bias))
    out = everything(h, w, labels, backend, bias=b)
    exact = reference.linear_logprobs(hidden.double(), weight.double(), labels, bias=bias.double())
    for a, e in zip(out, exact, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)
    assert out.logprobs[5] == -torch.inf
    out.logprobs[:5].sum().backward()
    assert h.grad.isfinite().all() and w.grad.isfinite().all() and b.grad.isfinite().all()
    hidden[2, 3] = torch.nan
    out = everything(hidden, weight, labels, backend, bias=bias)
    assert out.logprobs[2].isnan() and not out.logprobs[[0, 1, 3, 4]].isnan().any()


def kept_sets(rows: int, vocab: int, share: float):
    mask = torch.rand(rows, vocab) < share
    indptr = torch.cat([torch.zeros(1, dtype=torch.long), mask.sum(1).cumsum(0)])
    return mask, (indptr, mask.nonzero()[:, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_kept_sets(backend, dtype, softcap):
    hidden, weight, bias, labels = head(21, 300, 40, dtype)
    labels[4] = -100
    mask, csr = kept_sets(21, 300, 0.1)
    check(hidden, weight, bias, labels, backend, kept=mask, softcap=softcap)
    check(hidden, weight, bias, labels, backend, kept=csr, softcap=softcap, temperature=0.8)
    a, b = (everything(hidden, weight, labels, backend, bias=bias, kept=kept) for kept in (mask, csr))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("shape", [(33, 127, 65), (70, 1000, 300), (1, 961, 1)], ids=str)
def test_rounded_gradients(backend, shape):
    """d logits rounded to bfloat16, as the caller may allow: gradients carry 2^-9 of the terms they are summed from."""
    hidden, weight, bias, labels = head(*shape, torch.bfloat16)
    leaves, outs = [], []
    for rounded in (torch.float32, torch.bfloat16):
        leaf = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        outs.append(everything(leaf[0], leaf[1], labels, backend, bias=leaf[2], workspace_dtype=rounded))
        (outs[-1].logprobs.sum() + 0.1 * outs[-1].entropy.sum()).backward()
        leaves.append(leaf)
    for a, b in zip(*outs, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(*leaves, strict=True):
        a, b = a.grad.double(), b.grad.double()
        assert float((a - b).norm()) < 2**-7 * float(a.norm())


def peaked(gap: float, dtype: torch.dtype = torch.float32, rows: int = 8, vocab: int = 300, width: int = 512):
    """Rows whose label's logit, or that of the column after it, is ahead of the others."""
    hidden = torch.randn(rows, width).to(dtype)
    weight = torch.randn(vocab, width) * 2 / width**0.5
    labels = torch.randint(0, vocab // 2, (rows,)) * 2
    at = labels + torch.arange(rows) % 2
    weight[at] = gap * hidden.float() / hidden.float().square().sum(-1, keepdim=True)
    return hidden, weight.to(dtype), labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("gap", [10.0, 25.0, 60.0])
def test_confident_rows(backend, gap, temperature, dtype):
    """Their gradients are differences that a logit computed twice, in two ways, would drown."""
    hidden, weight, labels = peaked(gap, dtype)
    for wanted in ((0,), (1,), (0, 1, 2)):
        grads = []
        for kind in ("ours", torch.float64, torch.float32):
            h, w = (t.to(kind if kind != "ours" else dtype).detach().requires_grad_() for t in (hidden, weight))
            if kind == "ours":
                out = everything(h, w, labels, backend, temperature=temperature)
            else:
                out = reference.linear_logprobs(h, w, labels, temperature=temperature)
            sum(out[i].sum() for i in wanted).backward()
            grads.append((h.grad, w.grad))
        for ours, exact, plain in zip(*grads, strict=True):
            # of these gradients 1e-6 may be all there is
            bound = 2 * float((plain - exact).abs().max()) + 1e-6 * float(exact.abs().max()) + 1e-9
            unit = 0 if dtype == torch.float32 else torch.finfo(dtype).eps
            assert float(((ours - exact).abs() - 0.51 * unit * exact.abs()).max()) <= bound, wanted


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_only_the_label_is_kept(backend, temperature):
    hidden, weight, labels = peaked(25.0)
    rows, vocab = len(labels), len(weight)
    for kept in (torch.zeros(rows, vocab, dtype=torch.bool), (torch.zeros(rows + 1, dtype=torch.long), labels[:0])):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = everything(h, w, labels, backend, kept=kept, temperature=temperature)
        rounding = 1e-7  # of 1: the statistics of listed columns are relative to a rounded maximum
        assert max(float(t.abs().max()) for t in out[:2]) < rounding
        (out.logprobs.sum() + out.entropy.sum()).backward()
        for t, by in ((h.grad, weight), (w.grad, hidden)):
            assert float(t.abs().max()) < rounding / temperature * float(by.abs().max())


def test_several_labels_a_row(backend):
    hidden, weight, bias, _ = head(12, 100, 24, torch.float32)
    labels = torch.randint(0, 100, (12, 3))
    labels[3, 1], labels[5] = -100, -100
    check(hidden, weight, bias, labels, backend)


def test_shapes_views_and_int32(backend):
    hidden, weight, bias, _ = head(24, 50, 20, torch.float32)
    labels = torch.randint(0, 50, (4, 6), dtype=torch.int32)
    x, wide = hidden.view(4, 6, 20), torch.randn(50, 30)
    wide[:, :20] = weight
    a = everything(x, weight, labels, backend, bias=bias)
    b = everything(x.transpose(0, 1).contiguous().transpose(0, 1), wide[:, :20], labels.long(), backend, bias=bias)
    for s, t in zip(a, b, strict=True):
        assert s.shape == (4, 6)
        torch.testing.assert_close(s, t, rtol=0, atol=2e-6 if backend == "reference" else 0)
    empty = everything(hidden[:0], weight, labels.view(-1)[:0], backend)
    assert [t.shape for t in empty] == [(0,)] * 3


def test_a_bias_may_lie_anywhere(backend):
    hidden, weight, _, labels = head(9, 60, 12, torch.float32)
    table = torch.randn(60, 4)
    for strided in (lambda t: t[:, 1], lambda t: t[0, :1].expand(60)):
        grads = []
        for make in (strided, lambda t, strided=strided: strided(t).contiguous()):
            h, t = hidden.clone().requires_grad_(), table.clone().requires_grad_()
            out = everything(h, weight, labels, backend, bias=make(t))
            sum(x.sum() for x in out).backward()
            grads.append((*out, h.grad, t.grad))
        for a, b in zip(*grads, strict=True):
            assert torch.equal(a, b)


def test_autocast_rounds_nothing(backend):
    hidden, weight, bias, _ = head(9, 260, 33, torch.float32)
    for labels in (torch.randint(0, 260, (9,)), torch.randint(0, 260, (9, 2))):
        results = []
        for enabled in (False, True):
            h, w, b = (t.clone().requires_grad_() for t in (hidden, weight, bias))
            with torch.autocast(h.device.type, torch.bfloat16, enabled=enabled):
                out = everything(h, w, labels, backend, bias=b)
            sum(x.sum() for x in out).backward()
            results.append((*out, h.grad, w.grad, b.grad))
        for a, b in zip(*results, strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16, torch.float32),
    ],
    ids=str,
)
def test_operands_of_two_kinds(backend, dtypes):
    hidden, weight, bias, labels = head(9, 130, 33, torch.float32)
    tensors = [t.to(d) for t, d in zip((hidden, weight, bias), dtypes, strict=True)]
    leaves = [[t.to(d or t.dtype, copy=True).requires_grad_() for t in tensors] for d in (None, torch.float64)]
    grads = []
    for leaf, name in zip(leaves, (backend, "reference"), strict=True):
        out = everything(leaf[0], leaf[1], labels, name, bias=leaf[2])
        (out.logprobs.sum() + 0.3 * out.entropy.sum()).backward()
        grads.append((out.logprobs, out.entropy, *(t.grad for t in leaf)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2 * torch.finfo(a.dtype).eps + 1e-5, atol=1e-5)


@pytest.mark.float64
def test_gradcheck(backend):
    hidden, weight, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (11, 4), (11,)))
    labels, kept = torch.tensor([0, -100, 7]), torch.rand(3, 11) < 0.6
    for i in range(3):
        assert torch.autograd.gradcheck(
            lambda h, w, b, i=i: everything(h, w, labels, backend, bias=b, kept=kept, softcap=5.0, temperature=0.7)[i],
            (hidden, weight, bias),
        )


def test_only_what_is_wanted_is_made(backend):
    hidden, weight, bias, labels = head(9, 60, 12, torch.float32)
    for which in range(3):
        tensors = [t.clone().requires_grad_(i == which) for i, t in enumerate((hidden, weight, bias))]
        everything(tensors[0], tensors[1], labels, backend, bias=tensors[2]).logprobs.sum().backward()
        assert [t.grad is not None for t in tensors] == [i == which for i in range(3)]


@pytest.mark.parametrize("op", ["linear_logprobs", "linear_policy_loss", "logprobs"])
def test_there_is_no_second_derivative(compiled, op):
    hidden, weight, _, labels = head(9, 60, 12, torch.float32)
    h = hidden.requires_grad_()
    if op == "logprobs":
        loss = fastrlhf.logprobs(h @ weight.T, labels, backend=compiled).logprobs.sum()
    elif op == "linear_logprobs":
        loss = fastrlhf.linear_logprobs(h, weight, labels, backend=compiled).logprobs.sum()
    else:
        loss = fastrlhf.linear_policy_loss(h, weight, labels, torch.zeros(9), torch.ones(9), None, backend=compiled).loss
    (grad,) = torch.autograd.grad(loss, h, create_graph=True)
    assert grad.isfinite().all()
    with pytest.raises(RuntimeError, match="no second derivative"):
        (loss.detach() + grad.square().sum()).backward()


def test_torch_compile(compiled):
    hidden, weight, _, labels = head(9, 60, 12, torch.float32)

    def f(h, w):
        out = fastrlhf.linear_logprobs(h * 1.0, w, labels, entropy=True, backend=compiled)
        return out.logprobs.sum() + out.entropy.sum()

    grads = []
    for function in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = function(h, w)
        loss.backward()
        grads.append((loss.detach(), h.grad, w.grad))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.randn(7, 5)}, "weight: expected shape"),
        ({"weight": torch.randn(7, 4, dtype=torch.float64)}, "weight: torch.float64 with hidden"),
        ({"bias": torch.randn(6)}, "bias: expected shape"),
        ({"labels": torch.zeros(2, dtype=torch.long)}, "labels: expected shape"),
        ({"labels": torch.tensor([0, 1, 7])}, "labels: 7 at"),
        ({"workspace_bytes": 0}, "workspace_bytes"),
        ({"weight_grad_dtype": torch.int32}, "weight_grad_dtype"),
        ({"temperature": 0.0}, "temperature"),
        ({"kept": torch.ones(3, 6, dtype=torch.bool)}, "kept: expected shape"),
        ({"hidden": torch.randn(4, 3).T}, "hidden: expected last stride 1"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
@pytest.mark.cpu_only
def test_errors(change, message):
    arguments = {"hidden": torch.randn(3, 4), "weight": torch.randn(7, 4), "labels": torch.tensor([0, 1, 6])} | change
    with pytest.raises((ValueError, TypeError, IndexError), match=message):
        fastrlhf.linear_logprobs(**arguments)


def test_tiles_cover_everything_once():
    for rows, vocab, workspace in ((1, 1, 1), (10, 5000, 1 << 12), (5000, 128256, 1 << 28), (100000, 1000, 1 << 20)):
        cut = chunked.tiles(rows, vocab, workspace)
        seen = torch.zeros(min(rows, 200), vocab, dtype=torch.uint8)
        for tile in cut:
            seen[tile.rows, tile.columns] += 1
        assert (seen == 1).all()
        assert cut.height * cut.width * 4 <= max(workspace, chunked.SMALLEST * 4)


def peak_bytes() -> int:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))


@pytest.mark.slow
@pytest.mark.cpu_only
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux")
def test_memory_stays_within_the_workspace():
    """4096 rows, 128256 columns: logits of 2.1 GB are never there."""
    hidden, weight, _, labels = head(4096, 128256, 64, torch.float32)
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    everything(h[:32], w, labels[:32])
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    before = peak_bytes()
    fastrlhf.linear_logprobs(h, w, labels).logprobs.sum().backward()
    gradients = h.grad.nbytes + w.grad.nbytes
    assert peak_bytes() - before < gradients + (300 << 20)
