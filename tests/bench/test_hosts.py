"""Runs of hosts, patched and not, must have the same metrics."""

from __future__ import annotations

import json
import math
import sys

import pytest

from bench import hosts

pytestmark = pytest.mark.cpu_only


def run(*losses: float) -> dict:
    rows = [{"loss": x} for x in losses]
    return {"rows": rows, "wall": 1.0, "live": [], "head_seconds": 0.0, "head_bytes": 0}


def test_what_is_no_number_is_far():
    assert hosts.compare("sft", run(1.0, 1.0), run(1.0, math.nan))["largest_difference"] == math.inf
    assert hosts.compare("sft", run(1.0, 2.0), run(1.0, 2.001))["largest_difference"] == pytest.approx(5e-4)


@pytest.mark.parametrize(("loss", "fails"), [(1.00005, False), (1.001, True), (math.nan, True)])
def test_metrics_that_differ_are_an_error(loss, fails, monkeypatch, tmp_path):
    out = tmp_path / "hosts.json"
    monkeypatch.setattr(hosts, "small_model", lambda directory: directory)
    monkeypatch.setattr(hosts, "pair", lambda name, directory: hosts.compare(name, run(1.0), run(loss)))
    monkeypatch.setattr(sys, "argv", ["hosts", "--only", "sft", "--out", str(out)])
    if fails:
        with pytest.raises(SystemExit, match="sft: loss differs by"):
            hosts.main()
    else:
        hosts.main()
    assert json.loads(out.read_text())["rows"][0]["run"] == "sft"
