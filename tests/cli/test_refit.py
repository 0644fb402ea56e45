"""`fastrlhf refit`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from fastrlhf.cli.main import main
from fastrlhf.refit.cost import RATES, cost_of, places
from fastrlhf.refit.layouts import catalogue_for, layout
from fastrlhf.refit.plan import make_plan
from fastrlhf.refit.shapes import model_of

from ..refit.test_plan import LARGE


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(LARGE))
    return str(tmp_path)


def test_a_plan_is_printed(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["refit", "plan", "--from", "tp8pp4", "--to", "tp4", "--model", config]) == 0
    out = capsys.readouterr().out
    assert "70.55B parameters in 723 tensors; 32 ranks -> 4" in out
    assert "141.12 GB; every element of the destination is written once" in out
    rows = {m[1]: float(m[2]) for m in re.finditer(r"^(device|node|network)\s+([\d.]+)", out, re.M)}
    assert abs(sum(rows.values()) - 141.12) < 0.02 and rows["device"] > 0 and rows["network"] > rows["node"]
    assert main(["refit", "plan", "--from", "tp8pp4", "--to", "tp4", "--model", config, "--apart"]) == 0
    assert re.search(r"^device\s+0.00", capsys.readouterr().out, re.M)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from", "tp8x", "--to", "tp4"], "layout: expected sizes as in tp8pp4"),
        (["--from", "tp7", "--to", "tp4"], "cannot be shared evenly among 7"),
        (["--from", "tp8", "--to", "tp4", "--gpus-per-node", "0"], "gpus-per-node: expected >= 1, got 0"),
        (["--from", "tp8", "--to", "tp2", "--to-layout", "hf"], "hf holds whole tensors on one rank, got tp2"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    words: list[str], message: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["refit", "plan", "--model", config, *words]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
    assert main(["refit", "plan", "--model", config + "/none", "--from", "tp1", "--to", "tp1"]) == 2
    assert "model: " in capsys.readouterr().err


def test_the_floor_is_the_busiest_links() -> None:
    model = model_of({**LARGE, "num_hidden_layers": 4})
    source = catalogue_for(model, layout("tp2", "megatron")).at(places(2, 8))
    here = make_plan(source, catalogue_for(model, layout("tp2", "engine")).at(places(2, 8)))
    there = make_plan(source, catalogue_for(model, layout("tp2", "engine")).at(places(2, 8, 8)))
    a, b = cost_of(here), cost_of(there)
    assert a.nbytes == b.nbytes and a.links[0].nbytes > 0.98 * a.nbytes and b.links[2].nbytes == b.nbytes
    assert abs(b.floor - b.links[2].busiest / RATES["network"]) < 1e-12 and a.floor < b.floor / 20
    assert cost_of(there, {"network": 1e9}).floor == b.links[2].busiest / 1e9


def test_an_engines_files_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["refit", "check", "vllm", "--at", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "vllm/entrypoints/llm.py: there is no such file" in out and "recorded for 0.33.0 <= version < 0.34.0" in out
