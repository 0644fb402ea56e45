"""`fastrlhf verify` passes on kernels that are right, and names the operation and the input of one that is not."""

from __future__ import annotations

import ctypes
import json

import pytest
from fastrlhf import _cpu
from fastrlhf.cli import verify
from fastrlhf.cli.doctor import public_ops
from fastrlhf.cli.main import main
from fastrlhf.ops import backend
from fastrlhf.verification.cases import Shapes, cases
from fastrlhf.verification.large import check_large

QUICK = ["--host", "none", "--shapes", "3x17x203", "--no-large"]


class Broken:
    """The compiled kernels with one of them wrong."""

    def __init__(self, name: str, damage) -> None:
        self.name, self.damage = name, damage

    def __getattr__(self, name: str):
        real = getattr(_cpu, name)
        if name != self.name:
            return real

        def run(*args):
            result = real(*args)
            self.damage(*args)
            return result

        return run


def add(address: int, value: float, at: int = 0) -> None:
    ctypes.cast(address, ctypes.POINTER(ctypes.c_float))[at] += value


def drops_the_label_of_the_last_row(logits, rows, vocab, labels, scaling, kept, results, *_) -> None:
    if rows > 1 and logits[1] == 0:
        add(results[0], 1e-3, rows - 1)


def forgets_a_gap(
    shape, f64, rewards, scores, logprobs, ref, values, mask, bootstrap, shaping, gamma, lam, lams, mode, *outputs
):
    if mode == 0 and outputs[2]:
        add(outputs[2], 1e-3)


def test_passes(capsys):
    assert main(["verify", *QUICK]) == 0
    assert "comparisons passed: all" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_passes_in_half_precision(dtype):
    assert main(["verify", *QUICK, "--dtype", dtype]) == 0


@pytest.mark.parametrize(
    ("kernel", "damage", "names"),
    [
        (
            "logprobs_forward",
            drops_the_label_of_the_last_row,
            "FAILED logprobs on a vocabulary of 205, a multiple of nothing: result 0",
        ),
        ("rollout", forgets_a_gap, "FAILED gae on gaps inside the mask, mask_mode carry: result 0"),
    ],
)
def test_a_broken_kernel_is_named(monkeypatch, capsys, kernel, damage, names):
    monkeypatch.setattr(backend, "_cpu", Broken(kernel, damage))
    assert main(["verify", *QUICK]) == 1
    assert names in capsys.readouterr().out


def test_an_operation_that_raises_is_named(monkeypatch, capsys):
    def refuse(*_):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(backend, "_cpu", Broken("kl", refuse))
    assert main(["verify", *QUICK]) == 1
    assert "FAILED kl on k1, near: raised RuntimeError: no such luck" in capsys.readouterr().out


def test_json(capsys, tmp_path):
    out = tmp_path / "found.json"
    assert main(["verify", *QUICK, "--json", "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    assert printed["passed"] and printed["device"] == "cpu" and printed["versions"]["torch"]
    assert all(r["error"] <= r["bar"] for r in printed["results"])


def test_every_operation_has_a_case():
    import torch

    assert {c.op for c in cases(Shapes(2, 5, 11), torch.float32, "cpu")} >= set(public_ops())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shapes", "4x128"], "--shapes: expected rows x tokens x vocabulary"),
        (["--shapes", "4x0x9"], "--shapes: expected rows x tokens x vocabulary"),
        (["--host", "tlr"], "--host: must be one of"),
        (["--device", "cuda:77"], "--device: 'cuda:77' cannot be used here"),
        (["--device", "meta"], "--device: 'meta' cannot be used here: expected one of cpu, cuda"),
        (["--out", "/nowhere/at/all.json"], "--out: expected a file in a folder that exists"),
        (["--out", "/"], "--out: expected a file in a folder that exists"),
    ],
)
def test_mistakes(words, message, capsys):
    assert main(["verify", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_host_that_is_not_installed(capsys, monkeypatch):
    monkeypatch.setattr(verify.patching, "host_version", lambda host: None)
    assert main(["verify", *QUICK[2:], "--host", "slime"]) == 2
    assert "--host: slime is not installed here" in capsys.readouterr().err
    assert verify.chosen_hosts(["all"]) == verify.chosen_hosts(None) == []


@pytest.mark.slow
def test_more_than_2_to_the_31():
    found = check_large("cpu", None)
    assert found is None or found.passed


def test_shapes_that_do_not_fit_are_cut(monkeypatch):
    monkeypatch.setattr(verify, "available_bytes", lambda device: verify.COPIES * 4 * 1000 * 50)
    assert verify.fitting(Shapes(2, 25, 1000), "cpu") == (Shapes(2, 25, 1000), "")
    shapes, note = verify.fitting(Shapes(4, 20, 1000), "cpu")
    assert shapes == Shapes(2, 20, 1000) and "2x20x1000 instead of 4x20x1000" in note
    assert verify.fitting(Shapes(4, 200, 1000), "cpu")[0] == Shapes(1, 50, 1000)
    assert verify.fitting(Shapes(4, 200, 10**9), "cpu")[0] == Shapes(1, 1, 10**9)
