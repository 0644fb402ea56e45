"""The seams of hosts that cannot be installed here, against functions written from their contract."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import sys

import pytest
import torch
from fastrlhf import integrations
from fastrlhf.integrations import patching
from fastrlhf.integrations.agreement import compare
from fastrlhf.integrations.seam import Seam, Sizes

from . import contracts
from .test_patching import everything, same

HOSTS = ("nemo_rl", "slime")
SEAMS = [s for name in HOSTS for s in integrations.host(name).seams]


@pytest.fixture(params=HOSTS)
def host(request, monkeypatch):
    for name, module in contracts.modules(request.param).items():
        monkeypatch.setitem(sys.modules, name, module)

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(patching, "version", absent)
    yield integrations.host(request.param)
    integrations.unpatch(request.param)


def test_live_and_left_as_it_was(host):
    before = everything(host.package)
    report = integrations.patch(host.name, quiet=True)
    assert len(report.live) == len(host.seams) and report.known, str(report)
    integrations.unpatch(host.name)
    assert same(before, everything(host.package))


@pytest.mark.parametrize("sizes", [Sizes(1, 2, 2), Sizes(4, 33, 301)], ids=str)
@pytest.mark.parametrize("seam", SEAMS, ids=lambda s: s.name)
def test_equal(seam: Seam, sizes):
    if sizes.rows == 1 and "masked_var" in seam.name:
        pytest.skip("one token has no variance")
    module = contracts.modules(seam.module.split(".")[0])[seam.module]
    _, original = patching.find(seam, module)
    replacement = seam.build(original)
    served = [not compare(seam.function(original), seam.function(replacement), call).declined for call in seam.calls(sizes)]
    assert any(served)


def test_a_host_that_changed_keeps_its_function(host, monkeypatch):
    """Another sign of the entropy, another clamp: what does not agree is not replaced."""
    if host.name == "nemo_rl":
        changed = sys.modules["nemo_rl.distributed.model_utils"].ChunkedDistributedEntropy
        real = changed.apply
        monkeypatch.setattr(changed, "apply", staticmethod(lambda *a: -real(*a)))
        name = "ChunkedDistributedEntropy"
    else:
        module = sys.modules["slime.utils.ppo_utils"]
        monkeypatch.setattr(module, "compute_approx_kl", lambda *a, **k: contracts.compute_approx_kl(*a, **k) * 0.5)
        name = "compute_approx_kl"
    states = {s.seam.rsplit(".", 1)[1]: s for s in integrations.patch(host.name, quiet=True).seams}
    assert states[name].state == "not live" and "the host's" in states[name].note
    assert sum(s.state == "live" for s in states.values()) == len(host.seams) - 1


def test_a_keep_mask(monkeypatch):
    seam = next(s for s in SEAMS if s.name.endswith("calculate_log_probs_and_entropy"))
    ours = seam.build(contracts.calculate_log_probs_and_entropy)
    from fastrlhf.integrations.hosts.nemo_rl import alone

    x, y = torch.randn(6, 30), torch.randint(0, 30, (6,))
    keep = torch.rand(6, 30) < 0.5
    keep[torch.arange(6), y] = True
    given = {"log_prob_keep_mask": keep}
    expected = contracts.calculate_log_probs_and_entropy(x, y, None, **given)[0]
    torch.testing.assert_close(ours(x, y, alone(), **given)[0], expected)


@pytest.mark.parametrize(("dtype", "declined"), [(torch.float32, True), (torch.bfloat16, True), (torch.int64, False)])
def test_a_mask_with_fractions_is_the_hosts(dtype, declined):
    """It blends with what it carries; ours takes what is not 0 as counted."""
    seam = next(s for s in SEAMS if s.name.endswith("_compute_gae"))
    original = contracts.GeneralizedAdvantageEstimator._compute_gae
    call = next(c for c in seam.calls(Sizes()) if c.name == "fractions in the mask")
    this, r, v, mask = call.args
    given = (mask if declined else mask * 2).to(dtype)
    found = compare(original, seam.build(original), dataclasses.replace(call, args=(this, r, v, given)))
    assert found.declined == ("a mask with fractions" if declined else "")
