from __future__ import annotations

import fastrlhf
import pytest
import torch

from tests.oracle import INTERPRETED, assert_accurate, assert_gradient_accurate, gradcheck

ROWS, VOCAB, K = (4, 130, 5) if INTERPRETED else (33, 1003, 20)
DIRECTIONS = ("forward", "reverse")


def plain(logits, teacher, ids, direction="forward", temperature=1.0, teacher_temperature=None):
    """The formula; entries of the teacher at -inf left out of both sets."""
    absent = teacher == -torch.inf
    x = logits.gather(-1, ids.long())
    p = torch.log_softmax(torch.where(absent, -torch.inf, x) / temperature, -1)
    q = torch.log_softmax(teacher / (teacher_temperature or temperature), -1)
    a, b = (q, p) if direction == "forward" else (p, q)
    a, b = torch.where(absent, 0.0, a), torch.where(absent, 0.0, b)
    return torch.where(absent, 0.0, a.exp() * (a - b)).sum(-1)


def case(rows=ROWS, vocab=VOCAB, k=K, dtype=torch.float32, scale=3.0):
    logits = (torch.randn(rows, vocab) * scale).to(dtype)
    teacher, ids = (torch.randn(rows, vocab) * scale).to(dtype).topk(k)
    return logits, teacher, ids


def check(logits, teacher, ids, backend, **options):
    upstream, results = torch.randn(logits.shape[:-1]), []
    for dtype in (None, torch.float64, torch.float32):
        x = logits.detach().to(dtype or logits.dtype, copy=True).requires_grad_()
        if dtype is None:
            losses = fastrlhf.topk_distill_loss(x, teacher, ids, backend=backend, **options).losses
        else:
            losses = plain(x, teacher.to(dtype), ids, **options)
        losses.backward(upstream.to(losses.dtype))
        results.append((losses, x.grad))
    assert results[0][0].dtype == torch.float32
    assert_accurate(*(losses for losses, _ in results), "losses")
    assert_gradient_accurate(*(grad for _, grad in results), "gradient")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_the_formula(backend, dtype, direction):
    check(*case(dtype=dtype), backend, direction=direction)
    check(*case(dtype=dtype), backend, direction=direction, temperature=0.7)
    check(*case(dtype=dtype), backend, direction=direction, temperature=2.0, teacher_temperature=0.5)


@pytest.mark.parametrize("k", [1, 2, 127])
def test_sizes_of_k(backend, k):
    check(*case(vocab=130, k=k), backend)


@pytest.mark.parametrize("options", [{}, {"teacher_temperature": 3.0}], ids=str)
def test_a_common_offset_changes_nothing(backend, options):
    logits, teacher, ids = case()
    here = fastrlhf.topk_distill_loss(logits.round(), teacher.round(), ids, backend=backend, **options).losses
    far = fastrlhf.topk_distill_loss(logits.round() + 1e4, teacher.round() - 1e4, ids, backend=backend, **options).losses
    torch.testing.assert_close(far, here, rtol=0, atol=1e-6)


def test_equal_distributions_are_at_distance_zero(backend):
    logits, _, _ = case()
    teacher, ids = logits.topk(K)
    x = logits.clone().requires_grad_()
    out = fastrlhf.topk_distill_loss(x, teacher, ids, backend=backend)
    out.loss.backward()
    assert out.losses.abs().max() < 1e-6 and x.grad.abs().max() < 1e-6
    assert out.stats.to_dict()["agreement"] == 1


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_absent_entries_are_in_neither_set(backend, direction):
    logits, teacher, ids = case()
    teacher[:, K // 2 :], ids[:, K // 2 :] = -torch.inf, -1
    for options in ({}, {"teacher_temperature": 2.0}):
        short = fastrlhf.topk_distill_loss(
            logits, teacher[:, : K // 2].contiguous(), ids[:, : K // 2], direction=direction, backend=backend, **options
        )
        x = logits.clone().requires_grad_()
        whole = fastrlhf.topk_distill_loss(x, teacher, ids, direction=direction, backend=backend, **options)
        torch.testing.assert_close(whole.losses, short.losses, rtol=0, atol=2e-6)
        whole.loss.backward()
        assert x.grad.isfinite().all() and int((x.grad != 0).sum(-1).max()) == K // 2


def test_masked_rows_may_hold_anything(backend):
    logits, teacher, ids = case()
    mask = torch.rand(ROWS) < 0.5
    mask[0] = True
    expected = fastrlhf.topk_distill_loss(logits[mask], teacher[mask], ids[mask], backend=backend)
    logits[~mask], teacher[~mask], ids[~mask] = torch.nan, torch.nan, -100
    x = logits.clone().requires_grad_()
    out = fastrlhf.topk_distill_loss(x, teacher, ids, mask, backend=backend)
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-6, atol=1e-7)
    assert torch.equal(out.losses[mask], expected.losses) and not out.losses[~mask].any()
    assert x.grad.isfinite().all() and not x.grad[~mask].any()
    a, b = out.stats.to_dict(), expected.stats.to_dict()
    assert a["tokens"] == b["tokens"] == mask.sum() and a["kl"] == pytest.approx(b["kl"]) and a["agreement"] == b["agreement"]
    nothing = fastrlhf.topk_distill_loss(x, teacher, ids, torch.zeros(ROWS), backend=backend)
    nothing.loss.backward()
    assert nothing.loss == 0 and nothing.stats.to_dict() == {"kl": 0, "agreement": 0, "tokens": 0}


def test_the_mean_is_over_weights_or_by_a_denominator(backend):
    logits, teacher, ids = case()
    weights = torch.rand(ROWS)
    losses = fastrlhf.topk_distill_loss(logits, teacher, ids, backend=backend).losses
    out = fastrlhf.topk_distill_loss(logits, teacher, ids, weights, backend=backend)
    torch.testing.assert_close(out.loss, (weights * losses).sum() / weights.sum(), rtol=1e-5, atol=1e-6)
    for denominator in (7.0, torch.tensor(7.0), torch.tensor([7.0], dtype=torch.float64)):
        x = logits.clone().requires_grad_()
        out = fastrlhf.topk_distill_loss(x, teacher, ids, weights, denominator=denominator, backend=backend)
        torch.testing.assert_close(out.loss, (weights * losses).sum() / 7, rtol=1e-5, atol=1e-6)
        assert out.loss.shape == () and out.loss.dtype == torch.float32
        out.loss.backward()
        y = logits.clone().requires_grad_()
        ((weights * plain(y, teacher, ids)).sum() / 7).backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-6)


def test_nothing_counts_where_the_denominator_is_0(backend):
    logits, teacher, ids = case()
    x = logits.requires_grad_()
    out = fastrlhf.topk_distill_loss(x, teacher, ids, denominator=torch.tensor(0.0), backend=backend)
    out.loss.backward()
    assert out.loss == 0 and not x.grad.any()


@pytest.mark.parametrize("temperatures", [(1e-20, 1e-20), (1e20, 1e20), (1e-5, 1e5)])
def test_extreme_temperatures(backend, temperatures):
    logits, teacher, ids = case()
    own, teachers = temperatures
    for direction in DIRECTIONS:
        out = fastrlhf.topk_distill_loss(
            logits, teacher, ids, direction=direction, temperature=own, teacher_temperature=teachers, backend=backend
        )
        expected = plain(logits.double(), teacher.double(), ids, direction, own, teachers)
        torch.testing.assert_close(out.losses.double(), expected, rtol=1e-5, atol=1e-6)


def test_leading_dimensions_and_row_strides(backend):
    logits, teacher, ids = case(rows=12)
    flat = fastrlhf.topk_distill_loss(logits, teacher, ids, backend=backend)
    padded = torch.cat([logits, torch.full((12, 3), torch.nan)], -1)[:, :VOCAB].view(3, 4, VOCAB)
    out = fastrlhf.topk_distill_loss(padded, teacher.view(3, 4, K), ids.int().view(3, 4, K), backend=backend)
    assert out.losses.shape == (3, 4) and torch.equal(out.losses.flatten(), flat.losses)


def test_repeats_are_bitwise_equal(backend):
    logits, teacher, ids = case()
    runs = []
    for _ in range(2):
        x = logits.clone().requires_grad_()
        out = fastrlhf.topk_distill_loss(x, teacher, ids, backend=backend)
        out.loss.backward()
        runs.append((out.loss.detach(), out.losses.detach(), x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_straight_from_hidden_states(backend):
    """The docstring's way: no logits but the K of each row."""
    _, teacher, ids = case()
    hidden, weight = torch.randn(ROWS, 24), torch.randn(VOCAB, 24) * 0.4
    results = []
    for fused in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if fused:
            kept = (torch.arange(0, ids.numel() + 1, K), ids.flatten())
            x = fastrlhf.linear_logprobs(h, w, ids, kept=kept, backend=backend).logprobs
            loss = fastrlhf.topk_distill_loss(x, teacher, None, backend=backend).loss
        else:
            loss = plain(h.double() @ w.double().T, teacher.double(), ids).mean()
        loss.backward()
        results.append((loss.detach().float(), h.grad, w.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


def test_gradient_numerically(backend):
    logits, teacher, ids = case(rows=3, vocab=11, k=4, dtype=torch.float64)
    for direction in DIRECTIONS:
        assert gradcheck(
            backend,
            lambda x, d=direction: (
                fastrlhf.topk_distill_loss(x, teacher, ids, direction=d, temperature=1.3, backend=backend).loss
            ),
            logits.requires_grad_(),
        )


def test_no_rows(backend):
    out = fastrlhf.topk_distill_loss(torch.zeros(0, 9), torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.long), backend=backend)
    assert out.loss == 0 and out.losses.shape == (0,)
