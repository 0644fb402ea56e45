from __future__ import annotations

import fastrlhf
import pytest
import torch
from fastrlhf.kernels.gae import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle import EXAMPLES, INTERPRETED, assert_accurate

LENGTHS = [0, 1, 7, 511, 512, 513, 1540 if INTERPRETED else 4096]
MODES = ["carry", "zero", "none"]


def masks(rows, length):
    mask = torch.rand(rows, length) < 0.7
    if rows > 1:
        mask[0] = False
        mask[1, length // 2 :] = False
    return mask


def rollout(rows, length, dtype=torch.float32):
    return torch.randn(rows, length).to(dtype), torch.randn(rows, length).to(dtype)


def double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def check_gae(r, v, mask, backend, **options):
    ours = fastrlhf.gae(r, v, mask, backend=backend, **options)
    oracle = reference.gae(r.double(), v.double(), mask, **{k: double(x) for k, x in options.items()})
    plain = reference.gae(r.float(), v.float(), mask, **options)
    for name, a, b, c in zip(("advantages", "returns"), ours, oracle, plain, strict=True):
        assert_accurate(a, b, c, name)
    return ours


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", LENGTHS)
def test_against_the_oracle(backend, mode, length):
    if backend == "reference" and length > 600:
        pytest.skip("the definition is a loop")
    r, v = rollout(4, length)
    for mask in (None, masks(4, length), torch.ones(4, length)):
        for gamma, lam in ((1.0, 0.95), (0.99, 1.0), (0.9, torch.tensor([0.0, 0.3, 0.95, 1.0]))):
            check_gae(r, v, mask, backend, gamma=gamma, lam=lam, mask_mode=mode, bootstrap=torch.randn(4))


def test_long_rows(compiled):
    length = 8192 if INTERPRETED else 16384
    r, v = rollout(2, length)
    mask = masks(2, length)
    mask[0, ::3] = True
    for lam in (0.95, 1.0):
        check_gae(r, v, mask, compiled, lam=lam)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, pytest.param(torch.float64, marks=pytest.mark.float64)], ids=str
)
def test_dtypes(backend, dtype):
    r, v = rollout(3, 300, dtype)
    a, returns = check_gae(r, v, masks(3, 300), backend)
    assert a.dtype == returns.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if dtype == torch.float64:
        oracle = reference.gae(r, v, masks(3, 300) | True)
        torch.testing.assert_close(fastrlhf.gae(r, v, backend=backend), oracle, rtol=1e-12, atol=1e-12)


def test_verl_carries_over_masked_tokens(backend):
    """Their loop, written out: values * m + (1 - m) * next (peers: `compute_gae_advantage_return`)."""
    r, v, mask = *rollout(5, 40), masks(5, 40).float()
    next_value, last, out = torch.zeros(5), torch.zeros(5), []
    for t in reversed(range(40)):
        delta = r[:, t] + 0.99 * next_value - v[:, t]
        last = (delta + 0.99 * 0.9 * last) * mask[:, t] + (1 - mask[:, t]) * last
        next_value = v[:, t] * mask[:, t] + (1 - mask[:, t]) * next_value
        out.append(last)
    a, returns = fastrlhf.gae(r, v, mask, gamma=0.99, lam=0.9, backend=backend)
    torch.testing.assert_close(a, torch.stack(out[::-1], 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(returns, a + v)


@pytest.mark.parametrize("mode", MODES)
def test_packed_is_padded(backend, mode):
    """To the bit, segments of length 0 and 1 among them; nothing crosses a boundary."""
    lengths = [5, 0, 1, 700, 0, 513, 64]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    total = int(cu[-1])
    r, v, mask = torch.randn(total), torch.randn(total), torch.rand(total) < 0.6
    lam, bootstrap = torch.rand(len(lengths)), torch.randn(len(lengths))
    a, returns = fastrlhf.gae(
        r, v, mask, cu_seqlens=cu, lam=lam, mask_mode=mode, bootstrap=bootstrap, gamma=0.98, backend=backend
    )
    for i, n in enumerate(lengths):
        s = slice(int(cu[i]), int(cu[i + 1]))
        b, ret = fastrlhf.gae(
            r[None, s], v[None, s], mask[None, s], lam=lam[i : i + 1], mask_mode=mode, bootstrap=bootstrap[i : i + 1],
            gamma=0.98, backend=backend,
        )  # fmt: skip
        assert b.shape == (1, n)
        assert torch.equal(a[s], b[0]) and torch.equal(returns[s], ret[0])


def test_masked_garbage_is_not_seen(backend):
    r, v = rollout(3, 600)
    mask = masks(3, 600)
    mask[2] = True
    dirty_r, dirty_v = r.masked_fill(~mask, torch.nan), v.masked_fill(~mask, torch.inf)
    for mode in ("carry", "zero"):
        a = fastrlhf.gae(r, v, mask, mask_mode=mode, backend=backend)[0]
        b = fastrlhf.gae(dirty_r, dirty_v, mask, mask_mode=mode, backend=backend)[0]
        assert torch.equal(a, b)


def test_rows_do_not_depend_on_the_batch(compiled):
    r, v, mask = *rollout(9, 1500), masks(9, 1500)
    whole = fastrlhf.gae(r, v, mask)
    again = fastrlhf.gae(r, v, mask)
    for a, b in zip(whole, again, strict=True):
        assert torch.equal(a, b)
    for i in range(9):
        part = fastrlhf.gae(r[i : i + 1], v[i : i + 1], mask[i : i + 1])
        assert torch.equal(whole[0][i], part[0][0]) and torch.equal(whole[1][i], part[1][0])


def test_strided_inputs(backend):
    r, v = torch.randn(70, 4).t(), torch.randn(4, 140)[:, ::2]
    a = fastrlhf.gae(r, v, backend=backend)
    b = fastrlhf.gae(r.contiguous(), v.contiguous(), backend=backend)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_whiten(backend):
    r, v, mask = *rollout(6, 700), masks(6, 700)
    plain, returns = fastrlhf.gae(r, v, mask, backend=backend)
    white, same = fastrlhf.gae(r, v, mask, whiten=True, backend=backend)
    assert torch.equal(returns, same) and (white[~mask] == 0).all()
    x = plain[mask].double()
    torch.testing.assert_close(white[mask].double(), (x - x.mean()) / (x.var() + 1e-8).sqrt(), rtol=1e-5, atol=1e-5)
    empty = fastrlhf.gae(r, v, torch.zeros_like(mask), whiten=True, backend=backend)[0]
    assert torch.equal(empty, torch.zeros_like(empty))


@pytest.mark.parametrize("kl", ["k1", "abs", "k2", "k3"])
@pytest.mark.parametrize("packed", [False, True])
def test_experience_is_shaping_then_gae(backend, kl, packed):
    B, T = 5, 650
    logprobs, ref, values = torch.randn(B, T), torch.randn(B, T), torch.randn(B, T)
    mask, scores, cu = masks(B, T), torch.randn(B) * 5, None
    if packed:
        cu = torch.tensor([0, 100, 100, 101, 2000, B * T])
        logprobs, ref, values, mask = (x.reshape(-1) for x in (logprobs, ref, values, mask))
    shaping = {"kl_coef": 0.1, "kl": kl, "score_clip": 4.0, "kl_clip": 1.5, "cu_seqlens": cu}
    rewards, kls = fastrlhf.shape_rewards(scores, logprobs, ref, mask, backend=backend, **shaping)
    oracle = reference.shape_rewards(scores.double(), logprobs.double(), ref.double(), mask, **shaping)
    plain = reference.shape_rewards(scores, logprobs, ref, mask, **shaping)
    assert_accurate(rewards, oracle[0], plain[0], "rewards")
    assert_accurate(kls, oracle[1], plain[1], "kl")
    a, returns = fastrlhf.gae(rewards, values, mask, cu_seqlens=cu, gamma=0.99, whiten=True, backend=backend)
    fused = fastrlhf.experience(scores, logprobs, ref, values, mask, gamma=0.99, whiten=True, backend=backend, **shaping)
    for x, y in zip(fused, (rewards, kls, a, returns), strict=True):
        assert torch.equal(x, y)


def test_the_score_lands_on_the_last_counted_token(backend):
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]])
    zeros = torch.zeros(4, 4)
    rewards, _ = fastrlhf.shape_rewards(
        torch.tensor([1.0, 2.0, 3.0, 9.0]), zeros, zeros, mask, kl_coef=0.5, score_clip=4.0, backend=backend
    )
    assert rewards.tolist() == [[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 3, 0], [0, 0, 0, 4]]


def test_discounted_returns(backend):
    r, mask = torch.randn(4, 555), masks(4, 555)
    g = fastrlhf.discounted_returns(r, mask, gamma=0.97, backend=backend)
    oracle = reference.discounted_returns(r.double(), mask, gamma=0.97)
    assert_accurate(g, oracle, reference.discounted_returns(r, mask, gamma=0.97))
    assert torch.equal(g, fastrlhf.gae(r, torch.zeros_like(r), mask, gamma=0.97, lam=1.0, backend=backend)[0])
    assert fastrlhf.discounted_returns(torch.tensor([1.0, 1.0, 1.0]), gamma=0.5, backend=backend).tolist() == [1.75, 1.5, 1.0]


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 700), min_size=0, max_size=5),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 2**31),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    density=st.sampled_from([0.0, 0.1, 0.9, 1.0]),
)
def test_hypothesis_packed(lengths, mode, seed, gamma, lam, density):
    torch.manual_seed(seed)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    total = int(cu[-1])
    r, v, mask = torch.randn(total), torch.randn(total), torch.rand(total) < density
    check_gae(r, v, mask, None, cu_seqlens=cu, gamma=gamma, lam=lam, mask_mode=mode)
