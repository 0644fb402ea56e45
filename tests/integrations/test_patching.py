"""Seams go live where they agree with the host, and leave it as it was."""

from __future__ import annotations

import dataclasses
import importlib
import sys

import pytest
import torch
from fastrlhf import integrations
from fastrlhf.integrations import patching
from fastrlhf.integrations.agreement import Disagreement, HostFailed, compare
from fastrlhf.integrations.imports import watch
from fastrlhf.integrations.seam import Call, Seam, Sizes, decline

from .conftest import SEAMS


def everything(package: str) -> dict[str, dict[str, object]]:
    """Every name of every module of a package, in order; of its classes too."""
    found: dict[str, dict[str, object]] = {}
    for name, module in list(sys.modules.items()):
        if name == package or name.startswith(package + "."):
            found[name] = dict(vars(module))
            for key, value in list(vars(module).items()):
                if isinstance(value, type):
                    found[f"{name}.{key}"] = dict(vars(value))
                if isinstance(value, dict) and key.isupper():
                    found[f"{name}.{key}"] = dict(value)
    return found


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(
        list(a[m]) == list(b[m]) and all(a[m][k] is b[m][k] for k in a[m] if not isinstance(a[m][k], dict)) for m in a
    )


def test_live_where_it_agrees(toyhost):
    functions, trainer = importlib.import_module("toyhost.functions"), importlib.import_module("toyhost.trainer")
    original = functions.logprobs
    report = patching.apply(toyhost, eager=True)
    states = {s.seam: s for s in report.seams}
    assert states["toyhost.functions.logprobs"].state == "live"
    assert states["toyhost.functions.logprobs"].places == 4  # its own, the registry's, two in the trainer
    assert functions.logprobs is trainer.logprobs is trainer.another_name is functions.REGISTRY["logprobs"]
    assert functions.logprobs is not original
    assert functions.logprobs.__doc__ == "The host's." and functions.logprobs.__name__ == "logprobs"
    assert states["toyhost.functions.Loss.forward"].state == "live"
    assert float(trainer.Loss().forward(torch.ones(3), torch.zeros(3))) == 0.0
    assert "fastrlhf_logprobs" in functions.REGISTRY


def test_not_live_and_why(toyhost):
    states = {s.seam: s for s in patching.apply(toyhost, eager=True).seams}
    wrong = states["toyhost.functions.wrong"]
    assert wrong.state == "not live" and "sines: result[0]" in wrong.note and "tolerance" in wrong.note
    assert states["toyhost.functions.gone"].note == "toyhost.functions has no gone"
    assert states["toyhost.late.logprobs"].state == "waiting"
    missing = dataclasses.replace(toyhost, seams=(SEAMS[4],), name="other")
    assert patching.apply(missing, eager=True).seams[0].note == "an_op_to_come is not in this build"


def test_unpatch_leaves_the_host_as_it_was(toyhost):
    importlib.import_module("toyhost.trainer")
    before = everything("toyhost")
    patching.apply(toyhost, eager=True)
    assert not same(before, everything("toyhost"))
    exec("from toyhost.functions import logprobs as later", vars(sys.modules["toyhost.trainer"]))
    patching.remove(toyhost)
    later = vars(sys.modules["toyhost.trainer"]).pop("later")
    assert later is before["toyhost.functions"]["logprobs"]
    assert same(before, everything("toyhost"))
    assert watch not in sys.meta_path


def test_twice_changes_nothing(toyhost):
    first = patching.apply(toyhost, eager=True)
    then = everything("toyhost")
    assert patching.apply(toyhost, eager=True).to_dict() == first.to_dict()
    assert same(then, everything("toyhost"))


def test_a_third_function_is_left(toyhost):
    patching.apply(toyhost, eager=True)
    functions = importlib.import_module("toyhost.functions")
    functions.wrong, functions.logprobs = None, len
    notes = {s.seam: s.note for s in patching.remove(toyhost).seams}
    assert "1 name(s) hold a third function" in notes["toyhost.functions.logprobs"]
    assert functions.logprobs is len


def test_patched_when_imported(toyhost, capsys):
    report = patching.apply(toyhost, eager=False)
    assert {s.state for s in report.seams} == {"waiting"} and "toyhost.functions" not in sys.modules
    trainer = importlib.import_module("toyhost.trainer")
    assert trainer.logprobs.__fastrlhf__ and trainer.another_name is trainer.logprobs
    functions = sys.modules["toyhost.functions"]
    assert type(functions.__loader__).__name__ == type(functions.__spec__.loader).__name__ == "SourceFileLoader"
    assert not hasattr(sys.modules["toyhost.functions"], "late")
    assert importlib.import_module("toyhost.late").logprobs.__fastrlhf__
    assert watch not in sys.meta_path


def test_an_untested_version_needs_a_comparison(toyhost):
    seam = dataclasses.replace(SEAMS[0], calls=None, unverified="it needs a GPU")
    for tested, state in ((("1.0", "1.2"), "live"), (("0.1", "0.9"), "not live")):
        other = dataclasses.replace(toyhost, seams=(seam,), tested=tested, name=f"host {tested}")
        found = patching.apply(other, eager=True)
        assert found.seams[0].state == state, found
        assert "it needs a GPU" in found.seams[0].note
        patching.remove(other)


def test_a_host_that_is_not_installed(toyhost):
    report = patching.apply(dataclasses.replace(toyhost, package="nothere", name="nothere"), eager=True)
    assert report.version is None and {s.note for s in report.seams} == {"nothere is not installed"}
    assert "not installed" in str(report)


def test_a_replacement_that_declines_everything_is_not_live(toyhost):
    def build(original):
        def replacement(logits, labels):
            decline("toy", "everything")
            return original(logits, labels)

        return replacement

    other = dataclasses.replace(toyhost, seams=(dataclasses.replace(SEAMS[0], build=build),), name="declining")
    assert patching.apply(other, eager=True).seams[0].note == "every call is left to the host's own function"


def test_the_random_state_is_left_alone(toyhost):
    state = torch.get_rng_state()
    patching.apply(toyhost, eager=True)
    assert torch.equal(state, torch.get_rng_state())


def test_unknown_names():
    with pytest.raises(ValueError, match="host: must be one of"):
        integrations.patch("tlr")
    with pytest.raises(ValueError, match="host: must be one of"):
        integrations.install("trl,vrel")


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        (lambda x: x.float(), "torch.float32"),
        (lambda x: x[:1], "(1,)"),
        (lambda x: (x, x), "structure"),
        (lambda x: x * 1.001, "tolerance"),
        (lambda x: x.detach() + (x - x.detach()) * 1.1, "result[1][0]"),
        (lambda x: 1 / 0, "ours raised ZeroDivisionError"),
        (lambda x: x * torch.nan, "nan"),
    ],
)
def test_disagreements_are_found(ours, message):
    call = Call("a case", (torch.tensor([1.0, 2.0], dtype=torch.float64),), grads=(0,))
    with pytest.raises(Disagreement, match=r"^a case: ") as found:
        compare(lambda x: x * 1.0, ours, call)
    assert message in str(found.value)


def test_the_nearer_one_to_float64_is_right():
    """The host's own formula may lose more in float32 than the tolerance allows."""
    far = Call("an offset", (torch.full((3,), 1e4) + torch.arange(3.0) / 7,), tolerance=1e-6)

    def formula(x):
        return (x * x - 1e8) / 1e3

    def host(x):
        out = torch.zeros(len(x))
        out[:] = formula(x.float())
        return out

    def exact(x):
        return formula(x.double()).to(x.dtype)

    found = compare(host, exact, far)
    assert found.hosts_error > 1e-6 > found.error
    with pytest.raises(Disagreement, match="tolerance"):
        compare(exact, host, far)
    with pytest.raises(Disagreement, match="tolerance"):
        compare(host, lambda x: exact(x) * 1.1, far)


def test_errors_must_agree():
    call = Call("no rows", (torch.zeros(0),), raises=ValueError)

    def refuse(x):
        raise ValueError("empty")

    assert compare(refuse, refuse, call).error == 0
    with pytest.raises(Disagreement, match="ours raised nothing; expected ValueError"):
        compare(refuse, lambda x: x, call)


def test_sizes_are_small_by_default():
    assert Sizes().rows * Sizes().length * Sizes().vocab < 10_000


def a_seam(calls) -> Seam:
    return Seam("toyhost.functions", "logprobs", lambda held: held, lambda sizes: calls(sizes), "logprobs")


def test_calls_with_arguments_that_a_version_lacks_are_left_out():
    x = torch.ones(3)

    def calls(sizes):
        yield Call("plain", (x,))
        yield Call("scaled", (x,), {"scale": 2.0})
        yield Call("two", (x, x))
        yield Call("as it was", (x,), without=("scale",))

    def older(x):
        return x

    def newer(x, scale=1.0):
        return x * scale

    assert [c.name for c in a_seam(calls).calls_of(older, Sizes())] == ["plain", "as it was"]
    assert [c.name for c in a_seam(calls).calls_of(newer, Sizes())] == ["plain", "scaled", "two"]
    assert [c.name for c in a_seam(calls).calls_of(max, Sizes())][:3] == ["plain", "scaled", "two"]  # shows no signature


def test_what_a_version_lacks_is_not_compared():
    def host(x):
        raise NotImplementedError("later")

    call = Call("newer", (torch.ones(3),), lacks=NotImplementedError)
    assert compare(host, lambda x: x * 2, call).error == 0.0
    with pytest.raises(Disagreement, match="ours is not finite"):
        compare(host, lambda x: x * torch.nan, call)
    with pytest.raises(HostFailed, match="newer: the host's function raised NotImplementedError: later"):
        compare(host, lambda x: x, dataclasses.replace(call, lacks=ValueError))
    assert compare(lambda x: x, lambda x: x, call).error == 0.0
    with pytest.raises(Disagreement, match="error"):
        compare(lambda x: x, lambda x: x * 2, call)


def test_a_function_that_needs_another_device_is_compared_there(monkeypatch):
    seen = []

    def host(x):
        seen.append("host")
        if len(seen) == 1:
            raise RuntimeError("0 active drivers")
        return x

    seam = a_seam(lambda sizes: [Call("plain", (torch.ones(3, device=sizes.device),))])
    with pytest.raises(HostFailed, match="0 active drivers"):
        patching.verified(seam, host, lambda x: x)
    seen.clear()
    monkeypatch.setattr(patching, "devices", lambda: ["cpu", "cpu"])
    assert patching.verified(seam, host, lambda x: x) == 0.0
    with pytest.raises(Disagreement, match="result"):
        patching.verified(seam, host, lambda x: x + 1)
