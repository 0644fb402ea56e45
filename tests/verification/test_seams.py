"""Hosts as `fastrlhf verify` finds them: whole, broken, or without what a seam needs."""

from __future__ import annotations

import dataclasses

import pytest
from fastrlhf.cli import verify
from fastrlhf.cli.main import main
from fastrlhf.integrations import patching
from fastrlhf.integrations.seam import Entry, Sizes, decline
from fastrlhf.verification.checking import Result
from fastrlhf.verification.seams import check_seams

from tests.integrations.conftest import SEAMS, build, calls, toyhost

__all__ = ["toyhost"]


def results(host) -> list[Result]:
    return list(check_seams(host, Sizes(rows=4), measure=False))


def only(toyhost, *seams):
    return dataclasses.replace(toyhost, seams=seams)


def test_a_host_that_cannot_be_imported_is_a_failure(toyhost, tmp_path):
    (tmp_path / "toyhost" / "__init__.py").write_text("raise ImportError('transformers is too old')")
    (found,) = results(toyhost)
    assert found.passed is False and found.note == "raised ImportError: transformers is too old"


def test_what_is_not_compared_has_not_passed(toyhost):
    def declining(original):
        def replacement(logits, labels):
            decline("toy", "everything")
            return original(logits, labels)

        return replacement

    needs = dataclasses.replace(SEAMS[0], calls=None, unverified="it needs a GPU")
    missing = dataclasses.replace(SEAMS[0], module="toyhost.nothere")
    declined = dataclasses.replace(SEAMS[0], build=declining)
    alone = Entry("toyhost.functions", "REGISTRY", "ours", build, "logprobs", "no such name", calls)
    found = results(only(toyhost, needs, missing, declined, alone))
    assert [r.passed for r in found] == [None] * 5
    notes = [r.note for r in found]
    assert notes[0] == "it needs a GPU" and notes[1].startswith("ModuleNotFoundError")
    assert notes[2] == notes[3] == "left to the host: everything"
    assert notes[4] == "toyhost.functions has no 'no such name' in REGISTRY"


def test_inputs_that_cannot_be_made_are_a_failure(toyhost):
    def broken(sizes):
        raise MemoryError("too many")

    (found,) = results(only(toyhost, dataclasses.replace(SEAMS[0], calls=broken)))
    assert found.passed is False and found.note == "raised MemoryError: too many"


def shifted(original):
    return lambda logits, labels: build(original)(logits, labels) + 1e-2


ENTRY = Entry("toyhost.functions", "REGISTRY", "fastrlhf_logprobs", shifted, "logprobs", "logprobs", calls)


@pytest.mark.parametrize("seam", [dataclasses.replace(SEAMS[0], build=shifted), ENTRY], ids=["seam", "entry"])
def test_a_broken_one_is_not_live_and_fails_the_command(seam, toyhost, monkeypatch, capsys, tmp_path):
    host = only(toyhost, seam)
    assert patching.apply(host, eager=True).seams[0].note.startswith("sines: result")
    monkeypatch.setattr(verify, "HOSTS", ("toyhost",))
    monkeypatch.setattr(verify, "host", lambda name: host)
    out = tmp_path / "found.json"
    words = ["--host", "toyhost", "--shapes", "3x17x203", "--no-large", "--no-speed", "--out", str(out)]
    assert main(["verify", *words]) == 1
    printed = capsys.readouterr().out
    assert f"FAILED {seam.name} on sines: sines: result" in printed and '"passed": false' in out.read_text()


def test_an_entry_that_cannot_be_compared_needs_a_tested_version(toyhost):
    entry = dataclasses.replace(ENTRY, build=build, like="renamed")
    for tested, state in ((("1.0", "1.2"), "live"), (("0.1", "0.9"), "not live")):
        host = dataclasses.replace(toyhost, seams=(entry,), tested=tested, name=f"host {tested}")
        status = patching.apply(host, eager=True).seams[0]
        assert status.state == state and "has no 'renamed' in REGISTRY" in status.note
        patching.remove(host)


def test_the_count_leaves_out_what_is_not_compared(toyhost, monkeypatch, capsys):
    host = only(toyhost, SEAMS[0], dataclasses.replace(SEAMS[1], calls=None, unverified="it needs a GPU"))
    monkeypatch.setattr(verify, "HOSTS", ("toyhost",))
    monkeypatch.setattr(verify, "host", lambda name: host)
    monkeypatch.setattr(verify, "cases", lambda *_: ())
    assert main(["verify", "--host", "toyhost", "--shapes", "3x17x203", "--no-large", "--no-speed"]) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 comparisons passed: all; 1 not compared" in printed and "not compared: it needs a GPU" in printed
