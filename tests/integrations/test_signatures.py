"""A replacement takes every argument that the host's function takes, or does not go live."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from fastrlhf.integrations import patching
from fastrlhf.integrations.signatures import mismatch, signature_of

from .conftest import SEAMS


def signature(text: str) -> inspect.Signature:
    namespace: dict[str, object] = {}
    exec(f"def f({text}): ...", namespace)
    return inspect.signature(namespace["f"])


@pytest.mark.parametrize(
    ("host", "ours", "expected"),
    [
        ("a, b=1", "a, b=1", None),
        ("a, b", "a, b, c=1", None),
        ("a, **kwargs", "a, b=1, **kwargs", None),
        ("x, y, /", "a, b, c=2", None),
        ("a, *, b=1", "a, b=1", None),
        ("a, b=1, c=2", "a, b=1", "'c', which ours does not take"),
        ("a, b=1", "a, **kwargs", "'b', which ours does not take"),
        ("a, *, b=1", "a", "'b', which ours does not take"),
        ("a, b", "b, a", "'a', which ours takes at another position"),
        ("a, b=1", "a, *, b=1", "'b', which ours takes at another position"),
        ("a, b=2", "a, b=1", "'b' with the default 2, ours with 1"),
        ("a, b=2", "a, b", "'b' with the default 2, ours without one"),
        ("x, y=2, /", "a, b=3", "'y' with the default 2, ours with 3"),
        ("x, y, /", "a", "'y', which ours does not take"),
        ("a, *args", "a", "*args, which ours does not take"),
        ("a", "a, b", "no 'b', which ours needs"),
    ],
)
def test_what_ours_must_take(host, ours, expected):
    assert mismatch(signature(host), signature(ours)) == expected


def test_an_autograd_function_is_called_by_position():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, scale=2.0):
            return x * scale

    for held in (Doubled, Doubled.apply):
        assert str(signature_of(held)) == "(x, scale=2.0, /)"


def test_a_new_keyword_of_the_host_is_not_live(toyhost, tmp_path):
    """What the comparison does not call with would crash the run, or be taken for nothing."""
    functions = tmp_path / "toyhost" / "functions.py"
    functions.write_text(functions.read_text().replace("def logprobs(logits, labels)", "def logprobs(logits, labels, top_k=0)"))
    states = {s.seam: s for s in patching.apply(toyhost, eager=True).seams}
    found = states["toyhost.functions.logprobs"]
    assert found.state == "not live" and found.note == "the host's takes 'top_k', which ours does not take"


def test_a_new_keyword_of_verls_kl_is_not_live():
    from fastrlhf.integrations.hosts.verl import HOST

    seam = next(s for s in HOST.seams if s.name.endswith(".kl_penalty"))

    def kl_penalty(logprob, ref_logprob, kl_penalty, clamp=20.0): ...

    with pytest.raises(patching.Unavailable, match="'clamp', which ours does not take"):
        patching.build(seam, kl_penalty)


def test_a_host_that_shows_no_signature_is_left_to_the_comparison():
    seam = dataclasses.replace(SEAMS[0], build=lambda held: lambda *args: held(*args))
    assert patching.build(seam, max)(1, 2) == 2
