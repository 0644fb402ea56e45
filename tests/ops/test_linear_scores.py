from __future__ import annotations

import fastrlhf
import pytest
import torch
from fastrlhf.kernels.kl import reference as kl_reference
from fastrlhf.kernels.linear_logprobs import reference

ROWS, VOCAB = (2, 7), 300


def heads(dtype=torch.float32):
    policy = torch.randn(*ROWS, 16).to(dtype), (torch.randn(VOCAB, 16) / 2).to(dtype), torch.randn(VOCAB).to(dtype)
    other = torch.randn(*ROWS, 24).to(dtype), (torch.randn(VOCAB, 24) / 2).to(dtype), torch.randn(VOCAB).to(dtype)
    labels = torch.randint(0, VOCAB, ROWS)
    labels[1, 3] = -100
    return policy, other, labels


@pytest.mark.parametrize("kind", ["k1", "k3", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_against_the_definitions(backend, kind, dtype):
    (h, w, b), (rh, rw, rb), labels = heads(dtype)
    out = fastrlhf.linear_scores(
        h,
        w,
        labels,
        (rh, rw),
        kind=kind,
        bias=b,
        ref_bias=rb,
        temperature=0.8,
        softcap=7.0,
        backend=backend,
        workspace_bytes=9600,
    )
    wide = [t.double() for t in (h, w, b, rh, rw, rb)]
    x, y = reference.logits(*wide[:3]), reference.logits(*wide[3:])
    lp, entropy, _ = reference.linear_logprobs(*wide[:2], labels, bias=wide[2], temperature=0.8, softcap=7.0)
    ref_lp = reference.linear_logprobs(*wide[3:5], labels, bias=wide[5], temperature=0.8, softcap=7.0)[0]
    if kind == "full":
        capped = [7 * torch.tanh(t / 7) for t in (x, y)]
        kl = kl_reference.kl_full(*capped, direction="reverse", temperature=0.8, mask=labels != -100)
    else:
        kl = kl_reference.kl(lp, ref_lp, kind=kind)
    for a, e in zip(out, (lp, entropy, ref_lp, kl), strict=True):
        assert a.shape == ROWS and a.dtype == torch.float32
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)
    assert not any(float(t[1, 3]) for t in out)


@pytest.mark.cpu_only
def test_the_same_policy_has_no_kl():
    (h, w, _), _, labels = heads()
    for kind in ("k1", "k3", "full"):
        out = fastrlhf.linear_scores(h, w, labels, (h, w), kind=kind)
        assert torch.equal(out.logprobs, out.ref_logprobs)
        assert float(out.kl.abs().max()) < 1e-6


@pytest.mark.cpu_only
def test_errors():
    (h, w, _), (rh, rw, _), labels = heads()
    for change, message in (
        ({"ref": (rh[:1], rw)}, "ref hidden: expected"),
        ({"ref": (rh, rw[:-1])}, "ref weight: expected the policy's 300 rows"),
        ({"ref": rh}, r"ref: expected \(hidden, weight\)"),
        ({"kind": "k4"}, "kind: expected one of"),
        ({"direction": "up"}, "direction: expected one of"),
        ({"kind": "full", "vocab_parallel": object()}, "vocab_parallel"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            fastrlhf.linear_scores(**{"hidden": h, "weight": w, "labels": labels, "ref": (rh, rw)} | change)


@pytest.mark.parametrize("direction", ["reverse", "forward", "js"])
def test_each_row_its_temperature(backend, direction):
    (h, w, b), (rh, rw, rb), labels = heads()
    T = torch.rand(*ROWS) + 0.5
    options = {"kind": "full", "direction": direction, "bias": b, "ref_bias": rb, "backend": backend}
    out = fastrlhf.linear_scores(h, w, labels, (rh, rw), temperature=T, **options)
    for i, j in ((0, 0), (1, 6)):
        at = slice(i, i + 1), slice(j, j + 1)
        one = fastrlhf.linear_scores(h[at], w, labels[at], (rh[at], rw), temperature=float(T[i, j]), **options)
        for a, e in zip(out, one, strict=True):
            torch.testing.assert_close(a[at], e, rtol=1e-5, atol=2e-6)


@pytest.mark.cpu_only
def test_the_full_kl_of_a_row_does_not_depend_on_its_neighbours_or_the_workspace():
    hidden, weight, labels = torch.randn(70, 16), torch.randn(500, 16), torch.randint(0, 500, (70,))
    ref = torch.randn(70, 24), torch.randn(500, 24)
    whole = fastrlhf.linear_scores(hidden, weight, labels, ref, kind="full")
    for n, workspace in ((1, 1 << 28), (3, 1 << 16), (33, 1 << 28), (70, 1)):
        part = fastrlhf.linear_scores(
            hidden[:n], weight, labels[:n], (ref[0][:n], ref[1]), kind="full", workspace_bytes=workspace
        )
        for a, b in zip(part, whole, strict=True):
            assert torch.equal(a, b[:n])
