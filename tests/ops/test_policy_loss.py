from __future__ import annotations

import fastrlhf
import pytest
import torch
from fastrlhf import RolloutCorrection
from fastrlhf.kernels.policy_loss import reference
from fastrlhf.kernels.value_loss import reference as value_reference
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle import EXAMPLES, INTERPRETED, assert_accurate, gradcheck

KINDS = reference.KINDS
REDUCTIONS = reference.REDUCTIONS
TOKENWISE = ("logprobs", "old_logprobs", "advantages", "rollout_logprobs", "ref_logprobs", "entropy")


def batch(B, T, spread=0.4):
    old = -torch.rand(B, T) * 4
    return {
        "logprobs": old + torch.randn(B, T) * spread,
        "old_logprobs": old,
        "advantages": torch.randn(B, T),
        "mask": torch.rand(B, T) < 0.7,
    }


def extras(b):
    shape = b["logprobs"].shape
    return {
        "rollout_logprobs": b["old_logprobs"] + torch.randn(shape) * 0.3,
        "ref_logprobs": b["old_logprobs"] + torch.randn(shape) * 0.3,
        "kl_coef": 0.05,
        "entropy": torch.rand(shape),
        "entropy_coef": 0.01,
    }


def split(arguments):
    names = ("logprobs", "old_logprobs", "advantages", "mask")
    return [arguments[n] for n in names], {k: v for k, v in arguments.items() if k not in names}


def run(function, arguments, dtype=None, **more):
    """Loss, stats, gradient of logprobs and of entropy."""
    given_ = {
        k: v.detach().to(dtype if dtype and v.is_floating_point() else v.dtype, copy=True) if isinstance(v, torch.Tensor) else v
        for k, v in arguments.items()
    }
    given_["logprobs"].requires_grad_()
    if given_.get("entropy") is not None:
        given_["entropy"].requires_grad_()
    positional, options = split(given_)
    loss, stats = function(*positional, **options, **more)
    (loss * 3).backward()
    values = stats.values if hasattr(stats, "names") else stats
    g = given_["entropy"].grad if given_.get("entropy") is not None else None
    return loss, values, given_["logprobs"].grad, g


def check(arguments, backend):
    ours = run(fastrlhf.policy_loss, arguments, backend=backend)
    oracle = run(reference.policy_loss, arguments, torch.float64)
    plain = run(reference.policy_loss, arguments, torch.float32)
    for name, a, b, c in zip(("loss", "stats", "gradient", "entropy gradient"), ours, oracle, plain, strict=True):
        if b is not None:
            assert_accurate(a.float(), b, c, f"{name} {arguments.get('kind')}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_against_the_oracle(backend, kind, reduction):
    for B, T in ((1, 1), (3, 7), (5, 513), (2, 4500)):
        b = batch(B, T)
        if B > 2:
            b["mask"][1] = False
        check(b | {"kind": kind, "reduction": reduction}, backend)
        check(
            b | extras(b) | {"kind": kind, "reduction": reduction, "rollout_correction": RolloutCorrection("tis", high=1.2)},
            backend,
        )


@pytest.mark.parametrize("kind", ["ppo", "gspo"])
def test_bounds(backend, kind):
    b = batch(6, 300, spread=1.5)
    for options in (
        {"clip_low": 0.1, "clip_high": 0.28}, {"dual_clip": 3.0}, {"delta": 1.5}, {"delta": 4.0}, {"ratio_clamp": 0.5},
        {"dual_clip": 1.1, "delta": 2.0, "ratio_clamp": 2.0, "clip_low": 0.5, "clip_high": 0.01},
    ):  # fmt: skip
        check(b | options | {"kind": kind}, backend)
    # ratios far from 1 in whole sequences, where the sequence-level clips act
    b["logprobs"] = b["old_logprobs"] + torch.tensor([-2.0, -0.5, 0.0, 0.1, 0.9, 2.0]).unsqueeze(1)
    for sign in (1, -1):
        for options in ({}, {"dual_clip": 1.5}, {"delta": 1.4}, {"ratio_clamp": 1.0}):
            check(b | options | {"kind": kind, "advantages": b["advantages"].abs() * sign}, backend)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("correction", ["tis", "mis", "icepop"])
def test_rollout_correction(backend, kind, level, correction):
    b = batch(6, 40)
    b["rollout_logprobs"] = b["old_logprobs"] + torch.randn(6, 1) * 0.02 + torch.randn(6, 40) * 0.1
    check(b | {"kind": kind, "rollout_correction": RolloutCorrection(correction, level, low=0.8, high=1.1)}, backend)


def test_advantages_of_sequences(backend):
    b = batch(4, 33)
    rows = torch.randn(4)
    for kind in KINDS:
        a = run(fastrlhf.policy_loss, b | {"advantages": rows, "kind": kind}, backend=backend)
        c = run(fastrlhf.policy_loss, b | {"advantages": rows.unsqueeze(1).expand(4, 33), "kind": kind}, backend=backend)
        assert torch.equal(a[0], c[0]) and torch.equal(a[2], c[2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_packed_is_padded(backend, kind, reduction):
    lengths = [4, 0, 1, 600, 33]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    total = int(cu[-1])
    b = {k: v[0] for k, v in batch(1, total).items()}
    e = extras(b)
    options = {"kind": kind, "reduction": reduction, "rollout_correction": RolloutCorrection("tis", "geometric", high=1.1)}
    check(b | e | options | {"cu_seqlens": cu}, backend)
    rows = torch.randn(5)
    check(b | {"advantages": rows, "kind": kind, "reduction": reduction, "cu_seqlens": cu}, backend)


@pytest.mark.skipif(INTERPRETED, reason="hundreds of programs")
def test_units_of_either_length(compiled):
    """A GPU's block takes more tokens from half a million on."""
    for T in (2**19 - 1, 2**19 + 1):
        check(batch(1, T), compiled)


@pytest.mark.parametrize("longest", [0, 0.5, 1])
def test_the_longest_of_many_segments(backend, longest):
    """More segments than a block has threads; the divisor is the number of those that count times the longest's length."""
    segments = 9 if INTERPRETED else 300  # a program each
    lengths = torch.randint(0, 3, (segments,))
    lengths[int(longest * (segments - 1))] = 7
    cu = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    b = {k: v[0] for k, v in batch(1, int(cu[-1])).items()} | {"mask": None}
    options = {"reduction": "seq-mean-token-sum-norm", "cu_seqlens": cu, "backend": backend}
    over = 7.0 * int((lengths > 0).sum())
    ours, given_ = (fastrlhf.policy_loss(*split(b)[0], denominator=d, **options).loss for d in (None, over))
    torch.testing.assert_close(ours, given_)
    ours, given_ = (fastrlhf.value_loss(*split(b)[0], denominator=d, **options).loss for d in (None, over))
    torch.testing.assert_close(ours, given_)


def test_one_sequence(backend):
    b = {k: v[0] for k, v in batch(1, 50).items()}
    flat = fastrlhf.policy_loss(*split(b)[0], backend=backend)
    rows = fastrlhf.policy_loss(*(v.unsqueeze(0) for v in split(b)[0]), backend=backend)
    assert torch.equal(flat.loss, rows.loss)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_counted(backend, kind):
    """Loss 0, gradient 0 and finite statistics, whatever lies under the mask (NeMo-Aligner #57)."""
    b = {k: torch.full((3, 20), torch.nan) for k in ("logprobs", "old_logprobs", "advantages")}
    b["mask"] = torch.zeros(3, 20, dtype=torch.bool)
    for reduction in REDUCTIONS:
        loss, stats, grad, _ = run(fastrlhf.policy_loss, b | {"kind": kind, "reduction": reduction}, backend=backend)
        assert loss == 0 and (grad == 0).all() and stats.isfinite().all()
    empty = {k: v[:, :0] for k, v in b.items()}
    assert fastrlhf.policy_loss(*split(empty)[0], kind=kind, backend=backend).loss == 0


@pytest.mark.parametrize("kind", KINDS)
def test_masked_garbage_is_not_seen(backend, kind):
    b = batch(3, 100)
    b |= extras(b)
    dirty = {
        k: v.masked_fill(~b["mask"], torch.nan) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in b.items()
    }
    options = {"kind": kind, "rollout_correction": "tis"}
    a, c = (run(fastrlhf.policy_loss, x | options, backend=backend) for x in (b, dirty))
    assert all(torch.equal(x, y) for x, y in zip(a, c, strict=True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_micro_batches_add_up(backend, reduction):
    """With the global denominator (TRL #3021 is what happens without)."""
    b = batch(8, 60)
    b["mask"][3] = False
    whole = run(fastrlhf.policy_loss, b | {"reduction": reduction}, backend=backend)
    count = {"token-mean": int(b["mask"].sum()), "token-sum": None, "seq-mean-token-sum-norm": 7 * 60}.get(reduction, 7)
    for denominator in (count, None if count is None else torch.tensor(float(count))):
        loss, grads = 0.0, []
        for s in (slice(0, 3), slice(3, 4), slice(4, 8)):
            part = {k: v[s] for k, v in b.items()}
            out = run(fastrlhf.policy_loss, part | {"reduction": reduction, "denominator": denominator}, backend=backend)
            loss += float(out[0])
            grads.append(out[2])
        assert loss == pytest.approx(float(whole[0]), rel=1e-5, abs=1e-6)
        torch.testing.assert_close(torch.cat(grads), whole[2], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs(backend, dtype):
    b = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch(3, 200).items()}
    loss, _, grad, _ = run(fastrlhf.policy_loss, b, backend=backend)
    assert loss.dtype == torch.float32 and grad.dtype == dtype
    oracle = run(reference.policy_loss, b, torch.float64)
    torch.testing.assert_close(loss.double(), oracle[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), oracle[2], rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_strided_and_weighted(backend):
    b = batch(4, 64)
    for mask in (torch.rand(4, 64), torch.randint(0, 3, (4, 64)), None):
        for kind in KINDS:
            check(b | {"mask": mask, "kind": kind}, backend)
    t = {k: v.t().contiguous().t() for k, v in b.items()}
    assert torch.equal(run(fastrlhf.policy_loss, t, backend=backend)[2], run(fastrlhf.policy_loss, b, backend=backend)[2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.float64
def test_gradcheck(backend, kind):
    b = {k: v.double() if v.is_floating_point() else v for k, v in batch(3, 5, spread=0.6).items()}
    e = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in extras(b).items()}
    entropy = e.pop("entropy").requires_grad_()

    def f(x, h):
        return fastrlhf.policy_loss(
            x, b["old_logprobs"], b["advantages"], b["mask"], entropy=h, kind=kind, backend=backend, **e
        ).loss

    if kind != "cispo":  # sg(): its gradient is not the derivative of its value
        assert torch.autograd.gradcheck(f, (b["logprobs"].requires_grad_(), entropy))


def test_statistics(backend):
    """By hand: ratios e^0.5 and e^-0.5 at both signs of the advantage, one masked token."""
    d = torch.tensor([[0.5, -0.5, 0.5, -0.5, 0.0, 9.0]])
    A = torch.tensor([[1.0, 1.0, -1.0, -1.0, 1.0, 1.0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
    old = torch.full((1, 6), -1.0)
    s = fastrlhf.policy_loss(old + d, old, A, mask, rollout_logprobs=old - 0.25, backend=backend).stats.to_dict()
    assert (
        s["tokens"] == 5 and s["clip_fraction_high"] == pytest.approx(1 / 5) and s["clip_fraction_low"] == pytest.approx(1 / 5)
    )
    up, down = 1.6487213, 0.6065307
    assert s["ratio_max"] == pytest.approx(up) and s["ratio_min"] == pytest.approx(down)
    assert s["ratio_mean"] == pytest.approx((2 * up + 2 * down + 1) / 5)
    assert s["approx_kl_k1"] == pytest.approx(0, abs=1e-7)
    assert s["approx_kl_k3"] == pytest.approx((2 * (up - 1.5) + 2 * (down - 0.5)) / 5, rel=1e-5)
    assert s["rollout_mismatch_mean"] == pytest.approx(0.25) and s["rollout_mismatch_max"] == pytest.approx(0.25)
    assert s["rollout_weight_mean"] == 1 and s["rollout_corrected_fraction"] == 0
    loss = fastrlhf.policy_loss(old + d, old, A, mask, backend=backend).loss
    assert float(loss) == pytest.approx((-1.2 - down + up + 0.8 - 1) / 5, rel=1e-6)


def test_run_twice_and_threads(compiled):
    b = batch(8 if INTERPRETED else 64, 1000)
    before = torch.get_num_threads()
    outs = []
    for n in (1, 2) if INTERPRETED else (1, 2, 3, 2):
        torch.set_num_threads(n)
        outs.append(run(fastrlhf.policy_loss, b, backend=compiled)[:3])
    torch.set_num_threads(before)
    for other in outs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(outs[0], other, strict=True))


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    kind=st.sampled_from(KINDS), reduction=st.sampled_from(REDUCTIONS), B=st.integers(1, 5), T=st.integers(1, 600),
    seed=st.integers(0, 2**31), density=st.sampled_from([0.0, 0.3, 1.0]),
)  # fmt: skip
def test_hypothesis(kind, reduction, B, T, seed, density):
    torch.manual_seed(seed)
    b = batch(B, T)
    b["mask"] = torch.rand(B, T) < density
    check(b | extras(b) | {"kind": kind, "reduction": reduction}, None)


# ---------------------------------------------------------------------------------------------------------------------
# the value loss shares reductions, masks and denominators


def value_batch(B, T):
    old = torch.randn(B, T)
    return old + torch.randn(B, T) * 0.3, old, torch.randn(B, T), torch.rand(B, T) < 0.7


def run_value(function, v, old, r, mask, dtype=None, **options):
    cast = [t.detach().to(dtype or t.dtype, copy=True) for t in (v, old, r)]
    cast[0].requires_grad_()
    loss, stats = function(*cast, mask, **options)
    (loss * 2).backward()
    return loss, stats.values if hasattr(stats, "names") else stats, cast[0].grad


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_loss_against_the_oracle(backend, reduction, clip):
    for B, T in ((1, 1), (3, 700), (2, 4500)):
        args = value_batch(B, T)
        options = {"clip": clip, "reduction": reduction}
        ours = run_value(fastrlhf.value_loss, *args, backend=backend, **options)
        oracle = run_value(value_reference.value_loss, *args, dtype=torch.float64, **options)
        plain = run_value(value_reference.value_loss, *args, **options)
        for name, a, b, c in zip(("loss", "stats", "gradient"), ours, oracle, plain, strict=True):
            assert_accurate(a, b, c, name)


def test_value_loss_packed_masked_and_checked(backend):
    v, old, r, mask = value_batch(4, 50)
    whole = run_value(fastrlhf.value_loss, v, old, r, mask, backend=backend, reduction="seq-mean-token-mean")
    cu = torch.tensor([0, 50, 100, 150, 200])
    packed = run_value(
        fastrlhf.value_loss,
        *(t.reshape(-1) for t in (v, old, r, mask)),
        backend=backend,
        reduction="seq-mean-token-mean",
        cu_seqlens=cu,
    )
    torch.testing.assert_close(packed[0], whole[0])
    torch.testing.assert_close(packed[2].reshape(4, 50), whole[2])
    nothing = run_value(fastrlhf.value_loss, v * torch.nan, old, r, torch.zeros_like(mask), backend=backend)
    assert nothing[0] == 0 and (nothing[2] == 0).all() and nothing[1].isfinite().all()
    x = v.double().requires_grad_()
    assert gradcheck(backend, lambda t: fastrlhf.value_loss(t, old.double(), r.double(), mask, backend=backend).loss, x)
    stats = fastrlhf.value_loss(r, old, r, None, clip=None, backend=backend).stats.to_dict()
    assert stats["explained_variance"] == pytest.approx(1)
