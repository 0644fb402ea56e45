"""TRL with its functions replaced by ours."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch
from fastrlhf import integrations, ops
from fastrlhf.integrations.agreement import compare
from fastrlhf.integrations.hosts import trl_linear
from fastrlhf.integrations.hosts.trl import HOST

from tests.integrations.test_patching import everything, same

from . import seams

utils = pytest.importorskip("trl.trainer.utils")


@pytest.mark.parametrize("sizes", seams.SIZES, ids=str)
@pytest.mark.parametrize("name", seams.names(HOST))
def test_equal(name, sizes):
    seams.check(HOST, name, sizes)


def test_live_and_left_as_it_was():
    importlib.import_module("trl.experimental.sdpo.loss_utils")
    before = everything("trl")
    report = integrations.patch("trl", quiet=True)
    try:
        assert len(report.live) >= 3, report
        assert sys.modules["trl.experimental.sdpo.loss_utils"].selective_log_softmax.__fastrlhf__
    finally:
        integrations.unpatch("trl")
    assert same(before, everything("trl"))


def plain(hidden, weight, labels, *, bias=None, temperature=1.0, softcap=None, entropy=False, **_):
    logits = hidden.float() @ weight.float().t()
    if bias is not None:
        logits = logits + bias.float()
    return ops.logprobs(logits, labels, temperature=temperature, softcap=softcap, entropy=entropy)


@pytest.mark.parametrize("sizes", seams.SIZES, ids=str)
def test_the_linear_seam_around_any_op(sizes, monkeypatch):
    """Scale, soft cap, bias and the metrics, around an op written here."""
    monkeypatch.setattr(ops, "linear_logprobs", plain, raising=False)
    monkeypatch.setattr(trl_linear, "obstacle", lambda *_: None)
    theirs = utils._ChunkedLogProbFunction
    ours = trl_linear.chunked_logprobs(theirs)
    (seam,) = [s for s in HOST.seams if s.attribute == "_ChunkedLogProbFunction"]
    for call in seam.calls_of(theirs, sizes):
        assert not compare(theirs.apply, ours.apply, call).declined


def test_top_rows_are_found_without_their_logits(monkeypatch):
    """Peaked rows and hopeless rows cost no product."""
    h, w = torch.randn(200, 16), torch.randn(300, 16)
    logits = h @ w.t()
    y = logits.argmax(-1)
    y[::2] = torch.randint(0, 300, (100,))
    out = ops.logprobs(logits, y, entropy=True)
    seen = []
    gather = torch.Tensor.gather
    monkeypatch.setattr(torch.Tensor, "gather", lambda self, *a: seen.append(len(self)) or gather(self, *a))
    top = trl_linear._is_top1(h, w, None, y, out.logprobs, out.entropy)
    assert torch.equal(top, logits.argmax(-1) == y)
    assert sum(seen) < 150


def test_what_it_declines(monkeypatch):
    monkeypatch.setattr(trl_linear, "obstacle", lambda *_: None)
    h, w = torch.zeros(2, 4), torch.zeros(8, 4)
    assert "log Σ p²" in trl_linear._obstacle(h, w, 1.0, None, 1.0, ("log_sum_sq_probs",))
    assert "soft cap" in trl_linear._obstacle(h, w, 1.0, 30.0, 1.0, ("mean_logits",))
    assert "scale" in trl_linear._obstacle(h, w, 1.0, None, -1.0, ())
    assert "ZeRO-3" in trl_linear._obstacle(h, w[:0], 1.0, None, 1.0, ())
    assert trl_linear._obstacle(h, w, 1.0, 30.0, 1.0, ("log_probs", "entropy")) is None


SCRIPT = """
import sys
import trl
from trl.trainer.utils import selective_log_softmax
print("live" if selective_log_softmax.__fastrlhf__ else "", *sys.argv[1:])
"""


@pytest.mark.parametrize("how", ["runner", "line"])
def test_environment_variable(how, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(("import fastrlhf.integrations; fastrlhf.integrations.install()\n" if how == "line" else "") + SCRIPT)
    runner = ["-m", "fastrlhf.integrations"] if how == "runner" else []
    env = dict(os.environ, FASTRLHF_PATCH="trl", PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run(
        [sys.executable, *runner, str(script), "--an", "argument"], capture_output=True, text=True, timeout=300, env=env
    )
    assert done.stdout.strip() == "live --an argument", done.stderr
    assert "seams live" in done.stderr or "selective_log_softmax: live" in done.stderr, done.stderr


def test_the_runner_refuses_an_unknown_host(tmp_path):
    env = dict(os.environ, FASTRLHF_PATCH="tlr", PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run(
        [sys.executable, "-m", "fastrlhf.integrations", "x.py"], capture_output=True, text=True, timeout=300, env=env
    )
    assert done.returncode != 0 and "must be one of" in done.stderr
