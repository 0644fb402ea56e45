"""The operations on NumPy and DLPack arrays give what they give on tensors, bit for bit, without torch."""

from __future__ import annotations

import os
import subprocess
import sys

import fastrlhf
import numpy as np
import pytest
import torch
from fastrlhf import arrays
from fastrlhf.arrays import losses, pairs, rollouts, softmax
from fastrlhf.kernels.gae.reference import MASK_MODES
from fastrlhf.kernels.group_advantages.reference import KINDS as GROUP_KINDS
from fastrlhf.kernels.kl.reference import DIRECTIONS
from fastrlhf.kernels.kl.reference import KINDS as KL_KINDS
from fastrlhf.kernels.policy_loss import reference as policy
from fastrlhf.kernels.preference_loss import reference as preference
from fastrlhf.kernels.value_loss import reference as value

draw = np.random.default_rng(0)
B, T, V = 5, 33, 301


def batch(dtype=np.float32):
    return draw.standard_normal((B, T)).astype(dtype)


def gaps():
    mask = draw.random((B, T)) < 0.7
    mask[1] = False
    return mask


def same(ours, theirs):
    if isinstance(theirs, torch.Tensor):
        theirs = theirs.numpy()
    assert np.array_equal(np.asarray(ours), theirs, equal_nan=True) and np.asarray(ours).dtype == theirs.dtype


def tensor(x):
    return None if x is None else torch.from_numpy(np.ascontiguousarray(x))


class Foreign:
    """An array that is known by DLPack alone, as JAX's are; results come back through its namespace."""

    def __init__(self, x):
        self.x = np.asarray(x)

    def __dlpack__(self, **options):
        assert not options or options == {"stream": None}
        return self.x.__dlpack__()

    def __dlpack_device__(self):
        return self.x.__dlpack_device__()

    def __array_namespace__(self):
        class Library:
            @staticmethod
            def from_dlpack(x):
                return Foreign(np.from_dlpack(x))

        return Library


@pytest.mark.parametrize("wrap", [lambda x: x, Foreign], ids=["numpy", "dlpack"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_logprobs(dtype, wrap):
    x, y = (draw.standard_normal((B, T, V)) * 3).astype(dtype), draw.integers(0, V, (B, T))
    y[0, ::2] = -100
    ours = arrays.logprobs(wrap(x), wrap(y), temperature=0.7, softcap=20.0, entropy=True, lse=True)
    theirs = fastrlhf.logprobs(tensor(x), tensor(y), temperature=0.7, softcap=20.0, entropy=True, lse=True)
    for a, b in zip(ours, theirs, strict=True):
        assert isinstance(a, np.ndarray if wrap is not Foreign else Foreign)
        same(a.x if isinstance(a, Foreign) else a, b)


def test_logprobs_of_slices_and_several_labels():
    x, y = draw.standard_normal((B, T + 1, V)).astype(np.float32), draw.integers(0, V, (B, T, 3)).astype(np.int32)
    same(arrays.logprobs(x[:, :-1], y).logprobs, fastrlhf.logprobs(torch.from_numpy(x)[:, :-1], tensor(y)).logprobs)
    assert arrays.logprobs(x[:0, 1:], y[:0], entropy=True).entropy.shape == (0, T)
    x.flags.writeable = False  # NumPy exports no such array by DLPack
    assert arrays.logprobs(x[:, 1:], y).entropy is None


def test_bfloat16_by_dlpack():
    x, y = torch.randn(4, V).bfloat16(), torch.randint(0, V, (4,))
    same(arrays.logprobs(x, y.numpy()).logprobs, fastrlhf.logprobs(x, y).logprobs)


@pytest.mark.parametrize(
    "mask", [None, gaps(), gaps().astype(np.float32), gaps().astype(np.int64)], ids=["none", "bool", "float", "int"]
)
def test_rollouts(mask):
    r, v, lp, ref, scores = batch(), batch(), batch(), batch(), draw.standard_normal(B).astype(np.float32)
    lam = draw.random(B).astype(np.float32)
    for options in ({"gamma": 0.9, "lam": 0.8}, {"mask_mode": "zero", "whiten": True}, {"lam": lam}):
        given = {k: tensor(x) if isinstance(x, np.ndarray) else x for k, x in options.items()}
        for a, b in zip(
            arrays.gae(r, v, mask, **options), fastrlhf.gae(tensor(r), tensor(v), tensor(mask), **given), strict=True
        ):
            same(a, b)
    same(arrays.discounted_returns(r, mask, gamma=0.9), fastrlhf.discounted_returns(tensor(r), tensor(mask), gamma=0.9))
    for function in ("shape_rewards", "experience"):
        extra = (v,) if function == "experience" else ()
        options = {"kl_coef": 0.1, "kl": "k3", "score_clip": 0.5}
        ours = getattr(arrays, function)(scores, lp, ref, *extra, mask, **options)
        theirs = getattr(fastrlhf, function)(
            tensor(scores), tensor(lp), tensor(ref), *map(tensor, extra), tensor(mask), **options
        )
        for a, b in zip(ours, theirs, strict=True):
            same(a, b)
    assert arrays.masked_mean(r, mask) == float(fastrlhf.masked_mean(tensor(r), tensor(mask)))
    assert np.float32(arrays.masked_var(r, mask)) == np.float32(fastrlhf.masked_var(tensor(r), tensor(mask)))
    same(arrays.whiten(r, mask), fastrlhf.whiten(tensor(r), tensor(mask)))
    same(arrays.sequence_logprobs(lp, mask), fastrlhf.sequence_logprobs(tensor(lp), tensor(mask)))


def test_packs():
    cu, r, v = np.array([0, 3, 3, 10], np.int32), batch()[0, :10], batch()[0, :10]
    for a, b in zip(arrays.gae(r, v, cu_seqlens=cu), fastrlhf.gae(tensor(r), tensor(v), cu_seqlens=tensor(cu)), strict=True):
        same(a, b)
    same(arrays.sequence_logprobs(r, cu_seqlens=cu), fastrlhf.sequence_logprobs(tensor(r), cu_seqlens=tensor(cu)))


@pytest.mark.parametrize("kind", GROUP_KINDS)
def test_group_advantages(kind):
    s, ids, lengths = draw.standard_normal(12).astype(np.float32), draw.integers(0, 4, 12), draw.integers(1, 9, 12)
    theirs = fastrlhf.group_advantages(tensor(s), tensor(ids), kind=kind, lengths=tensor(lengths))
    same(arrays.group_advantages(s, ids, kind=kind, lengths=lengths), theirs)


def test_kl():
    a, b = batch(), batch()
    for kind in KL_KINDS:
        ours = arrays.kl(a, b, kind=kind, clamp_input=2.0, clamp_output=1.0)
        same(ours, fastrlhf.kl(tensor(a), tensor(b), kind=kind, clamp_input=2.0, clamp_output=1.0))
    x, y, mask = (
        draw.standard_normal((B, V)).astype(np.float32),
        draw.standard_normal((B, V)).astype(np.float32),
        gaps()[:, 0].copy(),
    )
    for direction in DIRECTIONS:
        same(
            arrays.kl_full(x, y, direction=direction, mask=mask),
            fastrlhf.kl_full(tensor(x), tensor(y), direction=direction, mask=tensor(mask)),
        )


@pytest.mark.parametrize("kind", [*policy.KINDS, "gpg"])
@pytest.mark.parametrize("reduction", policy.REDUCTIONS)
def test_losses(kind, reduction):
    old, mask = -abs(batch()), gaps()
    new, a, ref = (
        old + batch() * 0.3,
        batch() if kind not in ("gspo", "gmpo") else draw.standard_normal(B).astype(np.float32),
        batch(),
    )
    options = {"kind": kind, "reduction": reduction, "clip_high": 0.28, "dual_clip": 3.0, "kl_coef": 0.1, "denominator": 77.0}
    ours = arrays.policy_loss(new, old, a, mask, ref_logprobs=ref, **options)
    theirs = fastrlhf.policy_loss(tensor(new), tensor(old), tensor(a), tensor(mask), ref_logprobs=tensor(ref), **options)
    assert ours.loss == float(theirs.loss) and ours.stats == theirs.stats.to_dict()
    ours = arrays.value_loss(new, old, ref, mask, reduction=reduction)
    theirs = fastrlhf.value_loss(tensor(new), tensor(old), tensor(ref), tensor(mask), reduction=reduction)
    assert ours.loss == float(theirs.loss) and ours.stats == theirs.stats.to_dict()


@pytest.mark.parametrize("wrap", [lambda x: x, Foreign], ids=["numpy", "dlpack"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_linear_logprobs(dtype, wrap):
    h, w, b = (draw.standard_normal(shape).astype(dtype) for shape in ((B, T, 24), (V, 24), (V,)))
    y = draw.integers(0, V, (B, T))
    y[0, ::2] = -100
    options = {"temperature": 0.7, "softcap": 20.0, "entropy": True, "lse": True}
    ours = arrays.linear_logprobs(wrap(h), wrap(w), wrap(y), bias=wrap(b), **options)
    theirs = fastrlhf.linear_logprobs(tensor(h), tensor(w), tensor(y), bias=tensor(b), **options)
    for a, b in zip(ours, theirs, strict=True):
        same(a.x if isinstance(a, Foreign) else a, b)
    assert arrays.linear_logprobs(h[0], w, y[0]).entropy is None


@pytest.mark.parametrize("kind", [*preference.KINDS, "cdpo", "spin"])
def test_preference_loss(kind):
    chosen, rejected, *rest = (-abs(draw.standard_normal(7)).astype(np.float32) for _ in range(6))
    ref = (None, None) if kind in ("simpo", "orpo") else rest[:2]
    options = {"kind": kind, "label_smoothing": 0.1, "beta": 0.3, "sft_coef": 0.2, "margin": 0.1, "kl_baseline": 0.05}
    given = {"chosen_rewards": rest[2], "rejected_rewards": rest[3], "chosen_lengths": np.arange(1, 8)}
    ours = arrays.preference_loss(chosen, rejected, *ref, **options, **given)
    theirs = fastrlhf.preference_loss(
        *map(tensor, (chosen, rejected, *ref)), **options, **{k: tensor(v) for k, v in given.items()}
    )
    same(ours.losses, theirs.losses)
    assert ours.loss == float(theirs.loss) and ours.stats == theirs.stats.to_dict()


@pytest.mark.parametrize("kind", preference.REWARD_KINDS)
def test_reward_loss(kind):
    chosen, rejected, margin = draw.standard_normal(7), draw.standard_normal(7), abs(draw.standard_normal(7))
    margin = None if kind == "bt" else margin
    ours = arrays.reward_loss(chosen, rejected, margin, kind=kind, denominator=9.0)
    theirs = fastrlhf.reward_loss(*map(tensor, (chosen, rejected, margin)), kind=kind, denominator=9.0)
    same(ours.losses, theirs.losses)
    assert ours.loss == float(theirs.loss) and ours.stats == theirs.stats.to_dict()


def test_regression_loss():
    p, t = batch(), batch()
    t[::2] = -100
    ours, theirs = arrays.regression_loss(p, t), fastrlhf.regression_loss(tensor(p), tensor(t))
    assert ours.loss == float(theirs.loss) and ours.stats == theirs.stats.to_dict()


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 20, "temperature": 0.7}, {"top_p": 0.8, "min_p": 0.01}, {"temperature": 0}], ids=str
)
def test_sample(options):
    x = (draw.standard_normal((B, T, V)) * 3).astype(np.float32)
    ours, theirs = arrays.sample(x, seed=5, **options), fastrlhf.sample(tensor(x), seed=5, **options)
    same(ours.tokens, theirs.tokens)
    same(ours.logprobs, theirs.logprobs)


def test_the_other_byte_order():
    x, y = draw.standard_normal((4, V)).astype(np.float32), np.arange(4)
    same(arrays.logprobs(x.astype(">f4"), y.astype(">i8")).logprobs, fastrlhf.logprobs(tensor(x), tensor(y)).logprobs)
    assert arrays.masked_mean(x.astype(">f4")) == arrays.masked_mean(x)


def test_names_are_the_definitions():
    """They are written twice, as the definitions import torch."""
    assert (softmax.KINDS, softmax.DIRECTIONS, rollouts.MODES, rollouts.GROUPS) == (
        KL_KINDS,
        DIRECTIONS,
        MASK_MODES,
        GROUP_KINDS,
    )
    assert (losses.POLICY_KINDS, losses.REDUCTIONS, losses.POLICY_STATS) == (policy.KINDS, policy.REDUCTIONS, policy.STATS)
    assert losses.VALUE_STATS == value.STATS
    assert (pairs.KINDS, pairs.REWARD_KINDS) == (preference.KINDS, preference.REWARD_KINDS)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: arrays.logprobs(np.zeros((2, 3), np.int8), np.zeros(2, np.int64)),
            TypeError,
            "logits: expected one of float32",
        ),
        (
            lambda: arrays.logprobs(np.zeros((2, 3), np.float32), np.zeros(3, np.int64)),
            ValueError,
            r"labels: expected shape \(2,\)",
        ),
        (lambda: arrays.logprobs(np.zeros((2, 3), np.float32), np.array([0, 7])), IndexError, "labels: 7 at flat position 1"),
        (
            lambda: arrays.logprobs(object(), np.array([0, 7])),
            TypeError,
            "logits: expected an array with __dlpack__, got object",
        ),
        (lambda: arrays.logprobs(np.zeros((2, 0), np.float32), np.array([0, 1])), ValueError, "V > 0"),
        (lambda: arrays.logprobs(np.zeros((2, 6), np.float32)[:, ::2], np.array([0, 1])), ValueError, "last dimension"),
        (lambda: arrays.logprobs(np.zeros((2, 3), np.float32), np.array([0, 1]), temperature=0), ValueError, "temperature"),
        (lambda: arrays.gae(batch(), batch()[:, 1:]), ValueError, "values: expected the shape of rewards"),
        (lambda: arrays.gae(batch(), batch(), lam=1.5), ValueError, r"lam: expected a number in \[0.0, 1.0\]"),
        (lambda: arrays.gae(batch(), batch(), mask_mode="skip"), ValueError, "mask_mode: must be one of"),
        (lambda: arrays.gae(batch()[0], batch()[0], cu_seqlens=np.array([0, 5])), ValueError, "cu_seqlens"),
        (lambda: arrays.kl(batch(), batch(), kind="k9"), ValueError, "kind: must be one of"),
        (lambda: arrays.group_advantages(np.zeros(2), np.zeros(2, int), kind="opo"), ValueError, "lengths: needed"),
        (lambda: arrays.policy_loss(batch(), batch(), np.zeros(3, np.float32)), ValueError, "advantages: expected the shape"),
        (lambda: arrays.policy_loss(batch(), None, batch()), TypeError, "old_logprobs"),
        (lambda: arrays.policy_loss(batch(), batch(), batch(), kl_coef=0.1), ValueError, "ref_logprobs: needed"),
        (lambda: arrays.value_loss(batch(), None, batch()), ValueError, "old_values: needed"),
        (lambda: arrays.masked_mean(batch()[:, ::2]), ValueError, "x: must be contiguous"),
        (
            lambda: arrays.logprobs(batch(), np.arange(B), ignore_index=None),
            TypeError,
            "ignore_index: expected an integer, got None",
        ),
        (
            lambda: arrays.logprobs(batch(), np.arange(B), ignore_index=1.5),
            TypeError,
            "ignore_index: expected an integer, got 1.5",
        ),
        (
            lambda: arrays.linear_logprobs(batch(), batch()[:, :5], np.arange(B)),
            ValueError,
            r"weight: expected shape \(V, 33\)",
        ),
        (
            lambda: arrays.linear_logprobs(batch(), batch(np.float64), np.arange(B)),
            TypeError,
            "weight: float64 with hidden float32",
        ),
        (lambda: arrays.preference_loss(*[batch()[0]] * 4, kind="simpo"), ValueError, "kind 'simpo' has no reference"),
        (
            lambda: arrays.preference_loss(*[batch()[0]] * 2, None, None, kind="dpo"),
            ValueError,
            "kind 'dpo' needs the reference",
        ),
        (lambda: arrays.preference_loss(*[batch()[0]] * 4, kind="rpo_sq"), ValueError, "needs both"),
        (
            lambda: arrays.reward_loss(batch()[0], batch()[0], kind="margin_bt"),
            ValueError,
            "margin: kind 'margin_bt' needs one",
        ),
        (lambda: arrays.regression_loss(batch(), batch()[1:]), ValueError, "targets: expected the shape of predictions"),
        (lambda: arrays.sample(batch(), seed=None), TypeError, "seed: expected an integer, got None"),
        (lambda: arrays.sample(batch(), seed=1, top_p=0.0), ValueError, "top_p"),
    ],
)
def test_mistakes(call, error, message):
    with pytest.raises(error, match=message):
        call()


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # importing it raises
import numpy as np
from fastrlhf import arrays
x = np.linspace(-3, 3, 4 * 50, dtype=np.float32).reshape(4, 50)
out = arrays.logprobs(x, np.arange(4), entropy=True)
expected = x - np.log(np.exp(x.astype(float)).sum(-1, keepdims=True))
assert abs(out.logprobs - expected[np.arange(4), np.arange(4)]).max() < 1e-5
arrays.gae(x, x, x > 0)
arrays.policy_loss(x, x, x)
arrays.sample(x, seed=0)
arrays.reward_loss(x[0], x[1])
assert sys.modules["torch"] is None and not any(m.startswith("torch.") for m in sys.modules)
print("without torch")
"""


@pytest.mark.parametrize("hosts", ["", "trl,verl"])
def test_torch_is_never_imported(hosts):
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), FASTRLHF_PATCH=hosts)
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, timeout=120, env=env)
    assert done.stdout.strip() == "without torch", done.stderr
