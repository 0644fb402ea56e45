"""`fastrlhf verify` compares with the host's own functions also where they are patched already."""

from __future__ import annotations

from fastrlhf.integrations import patching
from fastrlhf.integrations.seam import Sizes
from fastrlhf.verification.seams import check_seams

from tests.integrations.conftest import toyhost

__all__ = ["toyhost"]


def test_a_patched_host(toyhost):
    patching.apply(toyhost, eager=True)
    results = {r.name: r for r in check_seams(toyhost, Sizes(rows=4), measure=False)}
    wrong = results["toyhost.functions.wrong"]
    assert not wrong.passed and "tolerance" in wrong.note
    assert results["toyhost.functions.logprobs"].passed and results["toyhost.functions.logprobs"].error is not None
