"""What `python -m bench tune` writes; what it measures needs a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fastrlhf.kernels.common import tiles

from bench import tune


def test_the_table_is_written_as_it_lies_there(tmp_path):
    path = tmp_path / "tiles.json"
    tune.write(path, json.loads(tiles.TABLE.read_text()))
    assert path.read_text() == tiles.TABLE.read_text()


def test_every_kernel_of_the_table_is_tuned():
    assert [t.kernel for t in tune.TUNED] == sorted(tiles.table())
    for t in tune.TUNED:
        for rows in tiles.table()[t.kernel].values():
            assert all(set(choice) == set(t.candidates[0]) for _, choice in rows)
        assert t.buckets[-1][0] is None and all(c["num_warps"] for c in t.candidates)


def test_a_choice_changes_only_for_more_than_the_noise():
    now, other = {"BLOCK": 1024, "num_warps": 4}, {"BLOCK": 2048, "num_warps": 4}
    assert tune.best(now, [(now, 1.0), (other, 0.99)]) == now
    assert tune.best(now, [(now, 1.0), (other, 0.9)]) == other
    assert tune.best(now, [(other, 0.9)]) == other  # the present one does not run


def test_rows_of_an_architecture(monkeypatch, capsys):
    """Each bucket's fastest candidate, without a device: times by candidate."""
    monkeypatch.setattr(tune, "seconds", lambda call: call())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    like = torch.empty(0)

    def workload():
        return tiles.tile("logprobs.forward", like, 256)["BLOCK"]

    tuned = tune.Tuned(
        "logprobs.forward", tune.choices((256, 1024, 4096), (1, 4), 8), [(1024, lambda: workload), (None, lambda: workload)]
    )
    rows = tune.tune(tuned, like)
    assert rows == [[1024, {"BLOCK": 256, "num_warps": 1}], [None, {"BLOCK": 256, "num_warps": 1}]]
    assert capsys.readouterr().out.count(", before {'BLOCK': ") == 2
    assert tiles.tile("logprobs.forward", like, 256) == {"BLOCK": 256, "num_warps": 1}  # what was tried is forgotten


def test_an_architectures_rows_are_the_ones_chosen():
    like = torch.empty(0)
    with tiles.chosen_for("sm_90"):
        assert tiles.tile("gae.rollout", like, 100)["BLOCK"] == 1024
    assert tiles.tile("gae.rollout", like, 100)["BLOCK"] == 512


def test_the_sources_table_is_written_and_no_installed_one(monkeypatch, tmp_path, capsys):
    assert tune.TABLE.samefile(Path(__file__).parents[1] / "kernels" / "common" / "tiles.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tiles, "architecture_of", lambda index: "sm_99")
    monkeypatch.setattr(tune.torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(tune, "tune", lambda tuned, like: [[None, {"BLOCK": 7}]])
    out, before = tmp_path / "tiles.json", tiles.TABLE.read_text()
    out.write_text(before)
    assert tune.main(["--only", "kl", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["kl"]["sm_99"] == [[None, {"BLOCK": 7}]] and tiles.TABLE.read_text() == before


def test_a_call_is_timed_behind_a_backlog(monkeypatch):
    """Otherwise a kernel that is shorter than its launch would be timed as the host."""
    seen = []
    monkeypatch.setattr(tune.gpu, "sample", lambda run, calls, backlog: (seen.append((calls, backlog)), (2e-6, 1e-5))[1])
    assert tune.seconds(lambda: None) == 2e-6
    assert seen[-1] == (8, pytest.approx(2 * 1e-5 * 8 + 5e-5)) and seen[:3] == [(1, 0)] * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    assert tune.main([]) == 2
    assert "no GPU" in capsys.readouterr().out
