from __future__ import annotations

import fastrlhf
import pytest
import torch
from fastrlhf.ops.head_blocks import blocks
from fastrlhf.ops.linear_logprobs import HeadCall

from tests.oracle import INTERPRETED

B, T, V, H = (3, 5, 130, 16) if INTERPRETED else (5, 21, 700, 48)


def case(dtype=torch.float32):
    hidden = torch.randn(B, T, H).to(dtype)
    weight = (torch.randn(V, H) * 2 / H**0.5).to(dtype)
    bias = torch.randn(V).to(dtype)
    labels = torch.randint(0, V, (B, T))
    exact = fastrlhf.linear_logprobs(hidden, weight, labels, bias=bias, backend="reference").logprobs
    tokens = {
        "old_logprobs": exact + 0.3 * torch.randn(B, T),
        "advantages": torch.randn(B, T),
        "mask": torch.rand(B, T) < 0.7,
    }
    return hidden, weight, bias, labels, tokens


OPTIONS = [
    {},
    {"kind": "reinforce"},
    {"kind": "cispo", "clip_high": 0.28, "reduction": "seq-mean-token-mean"},
    {"kind": "sapo", "reduction": "seq-mean-token-sum"},
    {"dual_clip": 3.0, "ratio_clamp": 5.0, "reduction": "seq-mean-token-sum-norm"},
    {"kl_coef": 0.1, "kl": "k3", "entropy_coef": 0.02, "reduction": "token-sum", "denominator": 37.0},
    {"temperature": 0.8, "softcap": 6.0, "delta": 1.5},
    {"rollout_correction": "tis"},
    {"rollout_correction": fastrlhf.RolloutCorrection("mis", level="sequence"), "kl_coef": 0.05},
]


def both(backend, dtype, options, change=None, **more):
    """(loss, stats, gradients) in one step and in two."""
    hidden, weight, bias, labels, tokens = case(dtype)
    if change is not None:
        hidden, labels, tokens = change(hidden, labels, tokens)
    options = dict(options)
    if options.get("kl_coef"):
        options["ref_logprobs"] = tokens["old_logprobs"] + 0.1
    if "rollout_correction" in options:
        options["rollout_logprobs"] = tokens["old_logprobs"] + 0.2 * torch.randn_like(tokens["old_logprobs"])
    head = {k: options.pop(k) for k in ("temperature", "softcap", "kept") if k in options}
    results = []
    for one_step in (True, False):
        h, w, b = (t.clone().requires_grad_() for t in (hidden, weight, bias))
        if one_step:
            out = fastrlhf.linear_policy_loss(
                h, w, labels, *tokens.values(), bias=b, backend=backend, **head, **options, **more
            )
        else:
            lp = fastrlhf.linear_logprobs(h, w, labels, bias=b, entropy=True, backend=backend, **head)
            out = fastrlhf.policy_loss(lp.logprobs, *tokens.values(), entropy=lp.entropy, backend=backend, **options)
        (out.loss * 2).backward()
        results.append((out.loss.detach(), out.stats, h.grad, w.grad, b.grad))
    return results


def assert_same(results, dtype=torch.float32):
    (loss, stats, *grads), (loss_, stats_, *grads_) = results
    torch.testing.assert_close(loss, loss_, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(stats.values, stats_.values, rtol=1e-5, atol=1e-5)
    for name, a, b in zip(("hidden", "weight", "bias"), grads, grads_, strict=True):
        # one rounding to the dtype more or less
        bound = 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        assert float((a - b).abs().max()) <= bound * float(b.abs().max()) + 1e-8, name


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_two_steps(backend, options):
    assert_same(both(backend, torch.float32, options))
    assert_same(both(backend, torch.float32, options, workspace_bytes=V * 4 * 33))  # several blocks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves(backend, dtype):
    assert_same(both(backend, dtype, {"entropy_coef": 0.01}, workspace_bytes=V * 4 * 33), dtype)


def test_rounded_gradients(backend):
    """d logits rounded to bfloat16, as the caller may allow: gradients carry 2^-8 of the terms they are summed from."""
    options = {"entropy_coef": 0.01, "temperature": 0.9}
    (loss, stats, *grads), (loss_, stats_, *grads_) = both(
        backend, torch.bfloat16, options, workspace_dtype=torch.bfloat16, workspace_bytes=V * 4 * 33
    )
    torch.testing.assert_close(loss, loss_, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(stats.values, stats_.values, rtol=1e-5, atol=1e-5)
    for a, b in zip(grads, grads_, strict=True):
        a, b = a.float(), b.float()
        assert float((a - b).norm() / b.norm()) < 2**-7
        torch.testing.assert_close(a, b, rtol=2**-5, atol=float(b.abs().max()) * 2**-6)


def test_packed_and_per_sequence_advantages(backend):
    def packed(hidden, labels, tokens):
        tokens = {k: v.reshape(-1) for k, v in tokens.items()} | {"advantages": torch.randn(B)}
        return hidden.reshape(-1, H), labels.reshape(-1), tokens

    cu = torch.tensor([0, 4, 4, 9, 11, B * T] if B == 5 else [0, 4, 4, B * T])
    assert_same(both(backend, torch.float32, {"reduction": "seq-mean-token-mean", "cu_seqlens": cu}, packed))
    assert_same(both(backend, torch.float32, {}, lambda h, y, t: (h, y, t | {"advantages": torch.randn(B)})))


def test_kept_sets(backend):
    mask = torch.rand(B, T, V) < 0.2
    flat = mask.view(-1, V)
    csr = (torch.cat([torch.zeros(1, dtype=torch.long), flat.sum(1).cumsum(0)]), flat.nonzero()[:, 1])
    for kept in (mask, csr):
        assert_same(both(backend, torch.float32, {"kept": kept}, workspace_bytes=V * 4 * 33))


def test_masked_rows_are_not_looked_at(backend):
    def poison(hidden, labels, tokens):
        hidden[~tokens["mask"]] = torch.nan
        labels[~tokens["mask"]] = -100
        return hidden, labels, tokens

    for results in both(backend, torch.float32, {}, poison):
        for t in (results[0], *results[2:]):
            assert not t.isnan().any()


def test_nothing_counts(backend):
    def none(hidden, labels, tokens):
        return hidden, labels, tokens | {"mask": torch.zeros(B, T, dtype=torch.bool)}

    for results in both(backend, torch.float32, {}, none):
        assert float(results[0]) == 0
        assert not any(g.any() for g in results[2:])


def test_mask_none_counts_labels(backend):
    def some(hidden, labels, tokens):
        labels[:, :2] = -100
        return hidden, labels, tokens | {"mask": labels != -100}

    def same(hidden, labels, tokens):
        labels[:, :2] = -100
        return hidden, labels, tokens | {"mask": None}

    torch.manual_seed(1)
    a = both(backend, torch.float32, {}, some)[0]
    torch.manual_seed(1)
    hidden, weight, bias, labels, tokens = case()
    hidden, labels, tokens = same(hidden, labels, tokens)
    h = hidden.clone().requires_grad_()
    out = fastrlhf.linear_policy_loss(h, weight, labels, *tokens.values(), bias=bias, backend=backend)
    (out.loss * 2).backward()
    torch.testing.assert_close(out.loss.detach(), a[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(h.grad, a[2], rtol=1e-5, atol=1e-7)


def test_without_gradient(backend):
    hidden, weight, bias, labels, tokens = case()
    out = fastrlhf.linear_policy_loss(hidden, weight, labels, *tokens.values(), bias=bias, backend=backend)
    h = hidden.clone().requires_grad_()
    again = fastrlhf.linear_policy_loss(h, weight, labels, *tokens.values(), bias=bias, backend=backend)
    assert not out.loss.requires_grad
    assert again.loss.requires_grad
    torch.testing.assert_close(out.loss, again.loss.detach(), rtol=1e-6, atol=1e-6)


def test_sequence_level_kinds_name_the_other_way():
    hidden, weight, bias, labels, tokens = case()
    for kind in ("gspo", "gmpo"):
        with pytest.raises(ValueError, match=r"kind: .*policy_loss\(linear_logprobs"):
            fastrlhf.linear_policy_loss(hidden, weight, labels, *tokens.values(), bias=bias, kind=kind)


def test_the_gradients_are_given_once(compiled):
    hidden, weight, bias, labels, tokens = case()
    loss = fastrlhf.linear_policy_loss(
        hidden.requires_grad_(), weight, labels, *tokens.values(), bias=bias, backend=compiled
    ).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call it again"):
        loss.backward()


def test_a_bias_may_lie_anywhere(backend):
    hidden, weight, _, labels, tokens = case()
    table = torch.randn(V, 3)
    results = []
    for make in (lambda t: t[:, 1], lambda t: t[:, 1].contiguous()):
        h, t = hidden.clone().requires_grad_(), table.clone().requires_grad_()
        out = fastrlhf.linear_policy_loss(h, weight, labels, *tokens.values(), bias=make(t), backend=backend)
        out.loss.backward()
        results.append((out.loss.detach(), h.grad, t.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("gap", [10.0, 25.0, 60.0])
def test_confident_rows(backend, gap, temperature):
    """The same gradients in one step and in two where they are differences of nearly equal numbers."""
    rows, vocab, width = 8, 300, 256
    hidden, labels = torch.randn(rows, width), torch.arange(rows) * 3
    weight = torch.randn(vocab, width) * 2 / width**0.5
    weight[labels + torch.arange(rows) % 2] = gap * hidden / hidden.square().sum(-1, keepdim=True)
    old, advantages, options = torch.zeros(rows), torch.randn(rows), {"kind": "reinforce", "entropy_coef": 0.1}
    grads = []
    for way, dtype in (("one", torch.float32), ("two", torch.float32), ("two", torch.float64)):
        h, w = hidden.to(dtype).clone().requires_grad_(), weight.to(dtype).clone().requires_grad_()
        if way == "one":
            out = fastrlhf.linear_policy_loss(
                h, w, labels, old, advantages, None, temperature=temperature, backend=backend, **options
            )
        else:
            name = "reference" if dtype == torch.float64 else backend
            lp = fastrlhf.linear_logprobs(h, w, labels, temperature=temperature, entropy=True, backend=name)
            at = [t.to(dtype) for t in (old, advantages)]
            out = fastrlhf.policy_loss(lp.logprobs, *at, None, entropy=lp.entropy, backend=name, **options)
        out.loss.backward()
        grads.append((h.grad, w.grad))
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    lp = fastrlhf.linear_logprobs(h, w, labels, temperature=temperature, entropy=True, backend="reference")
    fastrlhf.policy_loss(lp.logprobs, old, advantages, None, entropy=lp.entropy, backend="reference", **options).loss.backward()
    for one, two, exact, plain in zip(*grads, (h.grad, w.grad), strict=True):
        bound = 2 * float((plain - exact).abs().max()) + 1e-6 * float(exact.abs().max()) + 1e-9
        for ours in (one, two):
            assert float((ours - exact).abs().max()) <= bound


@pytest.mark.parametrize("wants", [True, False])
def test_labels_of_masked_rows_may_be_anything(backend, wants):
    hidden, weight, bias, labels, tokens = case()
    losses = []
    for filler in (0, V + 1000):
        y = torch.where(tokens["mask"], labels, filler)
        out = fastrlhf.linear_policy_loss(
            hidden.clone().requires_grad_(wants), weight, y, *tokens.values(), bias=bias, backend=backend
        )
        losses.append(out.loss.detach())
    assert torch.equal(*losses)


def test_small_gradients_of_halves_survive_until_the_loss_is_scaled(backend):
    """A mean over 4096 tokens is below what float16 holds; its scaler multiplies it up again."""
    rows, scale = 4096 if not INTERPRETED else 64, 2.0**16
    hidden, weight = torch.randn(rows, 16).half(), (torch.randn(40, 16) * 0.3).half()
    labels, advantages = torch.randint(0, 40, (rows,)), torch.randn(rows) * 0.1
    old = fastrlhf.linear_logprobs(hidden, weight, labels, backend="reference").logprobs
    grads = []
    for dtype in (torch.float16, torch.float64):
        h, w = (t.to(dtype, copy=True).requires_grad_() for t in (hidden, weight))
        name = backend if dtype == torch.float16 else "reference"
        at = [t.to(torch.float32 if dtype == torch.float16 else dtype) for t in (old, advantages)]
        loss = fastrlhf.linear_policy_loss(h, w, labels, *at, None, denominator=4096.0, backend=name).loss
        (loss * scale).backward()
        grads.append((h.grad.double(), w.grad.double()))
    for ours, exact in zip(*grads, strict=True):
        assert float((ours - exact).norm() / exact.norm()) < 1e-3


@pytest.mark.cpu_only
def test_workspace_bounds_the_memory_of_wide_heads():
    """Of a block's rows, hidden states and gradients are there beside the logits."""
    rows, vocab, width, workspace = 4096, 32, 512, 1 << 20
    hidden, weight = torch.randn(rows, width), torch.randn(vocab, width)
    cut = blocks(
        HeadCall(
            hidden, weight, None, torch.zeros(rows, dtype=torch.long), None, None, None, None, 1.0, 0.0, -100, 0, vocab,
            workspace, False, False,
        ),
        "cpu", 1,
    )  # fmt: skip
    assert max(map(len, cut)) * (vocab + 5 * width) * 4 <= workspace
    assert torch.equal(torch.cat(cut), torch.arange(rows))


def test_torch_compile_breaks_the_graph(compiled):
    hidden, weight, bias, labels, tokens = case()
    losses = []

    def f(h):
        return fastrlhf.linear_policy_loss(h * 1.0, weight, labels, *tokens.values(), bias=bias, backend=compiled).loss * 2

    for function in (f, torch.compile(f, backend="aot_eager")):
        h = hidden.clone().requires_grad_()
        loss = function(h)
        loss.backward()
        losses.append((loss.detach(), h.grad))
    for a, b in zip(*losses, strict=True):
        assert torch.equal(a, b)
