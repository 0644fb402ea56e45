"""Every seam of a host on more inputs than it is compared on before it goes live."""

from __future__ import annotations

import importlib

import pytest
import torch
from fastrlhf.integrations import patching
from fastrlhf.integrations.agreement import compare
from fastrlhf.integrations.seam import Entry, Host, Seam, Sizes

SIZES = (
    Sizes(),
    Sizes(rows=1, length=2, vocab=2, hidden=1),
    Sizes(rows=5, length=33, vocab=1000, hidden=24),
    Sizes(rows=4, length=17, vocab=129, hidden=8, dtype=torch.bfloat16),
)


def compared(host: Host) -> list[Seam | Entry]:
    return [s for s in host.seams if s.calls is not None]


def names(host: Host) -> list[str]:
    return [s.name for s in compared(host)]


def check(host: Host, name: str, sizes: Sizes) -> None:
    """Ours against the host's on every call, and that ours serves at least one of them itself."""
    seam = next(s for s in compared(host) if s.name == name)
    if not hasattr(importlib.import_module("fastrlhf.ops"), seam.op):
        pytest.skip(f"{seam.op} is not in this build")
    _, original = patching.find(seam, importlib.import_module(seam.module))
    theirs, ours = seam.pair(original, patching.build(seam, original))
    served = [not compare(theirs, ours, call).declined for call in seam.calls_of(original, sizes)]
    assert any(served) or sizes.dtype != torch.float32
