"""The drift of log-probs, against the same statistics taken with NumPy."""

from __future__ import annotations

import fastrlhf
import numpy as np
import pytest
import torch

pytestmark = pytest.mark.cpu_only


def batch(B=6, T=40, scale=0.1):
    draw = torch.Generator().manual_seed(0)
    rollout = -torch.rand(B, T, generator=draw) * 3
    return rollout, rollout + torch.randn(B, T, generator=draw) * scale, torch.rand(B, T, generator=draw) < 0.7


def expected(d):
    size, ratio = abs(d), np.exp(d)
    return {
        "mean": size.mean(), "signed_mean": d.mean(), "max": size.max(), "k3": (ratio - 1 - d).mean(), "ratio_mean": ratio.mean(),
        "outside_fraction": ((ratio < 0.9) | (ratio > 1.1)).mean(), "tokens": len(d), "not_finite_fraction": 0.0,
        **{f"p{q}": np.sort(size)[round((len(d) - 1) * q / 100)] for q in (50, 90, 99)},
    }  # fmt: skip


def test_statistics():
    rollout, new, mask = batch()
    rollout[~mask] = torch.nan
    found = fastrlhf.logprob_drift(rollout, new, mask).stats.to_dict()
    for name, value in expected((new.double() - rollout.double())[mask].numpy()).items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    assert 0.2 < found["outside_fraction"] < 0.5


def test_no_drift_and_a_missed_update():
    rollout, new, mask = batch(scale=0.0)
    same = fastrlhf.logprob_drift(rollout, new, mask).stats.to_dict()
    assert same["max"] == same["outside_fraction"] == 0 and same["ratio_mean"] == 1
    late = new.clone()
    late[:, 30:] += 0.5  # the end of every sequence
    drift = fastrlhf.logprob_drift(rollout, late, None, bins=4)
    assert drift.by_position.tolist() == pytest.approx([0, 0, 0, 0.5], abs=1e-6)
    assert drift.stats.get("position_3") == drift.by_position[3]
    assert float(drift.stats.get("outside_fraction")) == pytest.approx(0.25)


def test_positions_end_with_the_last_counted_token():
    rollout, mask = torch.zeros(1, 40), torch.zeros(1, 40)
    mask[0, :8] = 1
    new = rollout.clone()
    new[0, 6:8] = 0.5
    assert fastrlhf.logprob_drift(rollout, new, mask).by_position.tolist() == [0, 0, 0, 0.5]


def test_a_pack_is_its_sequences():
    rollout, new, _ = batch(B=3, T=16)
    lengths = [16, 0, 7]
    flat = [torch.cat([t[i, :n] for i, n in enumerate(lengths)]) for t in (rollout, new)]
    packed = fastrlhf.logprob_drift(*flat, cu_seqlens=torch.tensor([0, 16, 16, 23]))
    mask = torch.zeros(3, 16)
    for i, n in enumerate(lengths):
        mask[i, :n] = 1
    padded = fastrlhf.logprob_drift(rollout, new, mask)
    torch.testing.assert_close(packed.stats.values, padded.stats.values)


def test_a_pack_with_a_mask_is_its_sequences():
    """The parts end with the last counted token there too."""
    rollout, new, counted = batch(B=3, T=16)
    lengths = [16, 0, 7]
    counted[0, 9:], counted[2, 4:] = False, False
    padded_mask = torch.zeros(3, 16, dtype=torch.bool)
    for i, n in enumerate(lengths):
        padded_mask[i, :n] = counted[i, :n]
    flat = [torch.cat([t[i, :n] for i, n in enumerate(lengths)]) for t in (rollout, new, padded_mask)]
    packed = fastrlhf.logprob_drift(*flat, cu_seqlens=torch.tensor([0, 16, 16, 23], dtype=torch.int32))
    padded = fastrlhf.logprob_drift(rollout, new, padded_mask)
    torch.testing.assert_close(packed.stats.values, padded.stats.values)
    assert packed.by_position.count_nonzero() == 4


def test_a_large_drift_stays_finite():
    found = fastrlhf.logprob_drift(torch.zeros(1, 2), torch.tensor([[1000.0, 0.0]])).stats.to_dict()
    assert found["ratio_mean"] == pytest.approx((np.exp(20) + 1) / 2) and found["k3"] == pytest.approx((np.exp(20) - 21) / 2)
    assert found["max"] == 1000 and found["outside_fraction"] == 0.5 and found["not_finite_fraction"] == 0


def test_what_is_not_finite_is_outside():
    new = torch.tensor([[0.0, -torch.inf, torch.nan, 0.0]])
    found = fastrlhf.logprob_drift(torch.zeros(1, 4), new).stats.to_dict()
    assert found["not_finite_fraction"] == found["outside_fraction"] == 0.5 and found["mean"] == 0 and found["tokens"] == 4


@pytest.mark.parametrize("shape", [(2, 5), (0, 5), (3, 0)])
def test_nothing_counted(shape):
    zeros = torch.zeros(shape)
    found = fastrlhf.logprob_drift(zeros, zeros + 1, torch.zeros(shape)).stats.values
    assert torch.equal(found, torch.zeros_like(found))


def test_mistakes():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="logprobs"):
        fastrlhf.logprob_drift(x, x[:1])
    with pytest.raises(ValueError, match="bins: expected a number >= 1"):
        fastrlhf.logprob_drift(x, x, bins=0)
    with pytest.raises(TypeError, match="rollout_logprobs"):
        fastrlhf.logprob_drift(x.long(), x)
