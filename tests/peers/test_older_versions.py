"""Older versions of the hosts, each unpacked into a folder of its own beside the others: which seams go live.

FASTRLHF_OLDER_HOSTS names a folder with trl-1.13.0/, verl-0.7.1/ and so on, each made by
pip install --no-deps --target trl-1.13.0 trl==1.13.0
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

OLDER = Path(os.environ.get("FASTRLHF_OLDER_HOSTS", ""))
# seams that do not go live in a version, and what the report must say of them; all others must
MISSING = {
    "trl-1.13.0": {"selective_log_softmax_and_entropy": "has no selective_log_softmax_and_entropy"},
    "trl-1.14.2": {},
    "trl-1.15.0": {"_ChunkedLogProbFunction": "the host's function raised RuntimeError"},  # a kernel for GPUs alone
    "verl-0.7.1": {"POLICY_LOSS_REGISTRY['fastrlhf_gspo']": "token-mean, local counts"},  # their gspo takes one mode alone
    "verl-0.8.0": {"POLICY_LOSS_REGISTRY['fastrlhf_gspo']": "token-mean, local counts"},
}
PROGRAM = """
import importlib, json, sys
import fastrlhf
host, modules = sys.argv[1], sys.argv[2:]
for name in modules:
    importlib.import_module(name)
report = fastrlhf.patch(host)
rows = [[s.seam.rpartition(".")[2], s.state, s.note] for s in report.seams]
print("REPORT" + json.dumps([report.version, rows]))
"""
ON_IMPORT = {"trl": [], "verl": ["verl.utils.experimental.torch_functional"]}


@pytest.mark.skipif(not os.environ.get("FASTRLHF_OLDER_HOSTS"), reason="FASTRLHF_OLDER_HOSTS is not set")
@pytest.mark.parametrize("folder", MISSING)
def test_the_seams_of_an_older_version_go_live(folder):
    host, version = folder.split("-")
    path = os.pathsep.join([str(OLDER / folder), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", PROGRAM, host, *ON_IMPORT[host]]
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    (line,) = [x for x in run.stdout.splitlines() if x.startswith("REPORT")]
    found, rows = json.loads(line[6:])
    assert found == version
    states = {name: (state, note) for name, state, note in rows}
    for name, (state, note) in states.items():
        if name in MISSING[folder]:
            assert state == "not live" and MISSING[folder][name] in note, (name, state, note)
        else:
            assert state == "live" or note.startswith("until"), (name, state, note)
    assert sum(state == "live" for state, _ in states.values()) >= (3 if host == "trl" else 27)
