from __future__ import annotations

import importlib.util
from pathlib import Path

SPEC = importlib.util.spec_from_file_location("cuda_resources", Path(__file__).parents[2] / "scripts" / "cuda_resources.py")
resources = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(resources)

REPORT = """
Fatbin elf code:
================
arch = sm_90a

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN1a1bEv:
  REG:40 STACK:0 SHARED:16 LOCAL:0 CONSTANT[0]:1104 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN1a1cEv:
  REG:128 STACK:24 SHARED:0 LOCAL:0 CONSTANT[0]:1104 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_a_stack_frame_is_found():
    rows = resources.parse(REPORT)
    assert [(r["kernel"], r["architecture"], r["registers"], r["stack"]) for r in rows] == [
        ("_ZN1a1bEv", "sm_90a", 40, 0), ("_ZN1a1cEv", "sm_90a", 128, 24),
    ]  # fmt: skip
    assert [line.split(" on ")[0] for line in resources.broken(rows)] == ["_ZN1a1cEv"]
    assert "128" in resources.table(rows)


def test_a_reason_allows_it(monkeypatch):
    monkeypatch.setitem(resources.STACK_ALLOWED, "_ZN1a1cEv", (24, "known"))
    assert resources.broken(resources.parse(REPORT)) == []
