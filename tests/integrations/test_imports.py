"""Seams and imports: what waits, what does not, and what two threads do at once."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import runpy
import sys
import threading
import types

import pytest
from fastrlhf import integrations
from fastrlhf.integrations import patching
from fastrlhf.integrations.imports import exists, watch

from .conftest import SEAMS


@pytest.fixture
def named(toyhost, monkeypatch):
    """The toy under the functions that users call."""
    monkeypatch.setattr(integrations, "HOSTS", ("toyhost",))
    monkeypatch.setattr(integrations, "host", lambda name: toyhost)
    return toyhost


def functions():
    return importlib.import_module("toyhost.functions")


def is_ours(function) -> bool:
    return getattr(function, "__fastrlhf__", False)


def test_unpatch_before_the_host_is_imported(named):
    integrations.install("toyhost")
    assert watch in sys.meta_path
    integrations.unpatch("toyhost")
    assert watch not in sys.meta_path and not is_ours(functions().logprobs)


def test_install_again_after_unpatch(named):
    integrations.install("toyhost")
    assert is_ours(functions().logprobs)
    integrations.unpatch("toyhost")
    assert not is_ours(functions().logprobs)
    integrations.install("toyhost")
    assert is_ours(functions().logprobs)
    integrations.install("toyhost")
    assert is_ours(functions().logprobs)


def test_patch_while_another_thread_imports(toyhost, tmp_path):
    """The import calls back for the lock while it holds the module, for which whoever held the lock would wait."""
    slow = tmp_path / "toyhost" / "functions.py"
    slow.write_text("import time\ntime.sleep(0.6)\n" + slow.read_text())
    patching.apply(toyhost, eager=False)
    first = dataclasses.replace(toyhost, seams=(dataclasses.replace(SEAMS[0], module="toyhost.trainer"), *toyhost.seams))
    importer = threading.Thread(target=functions, daemon=True)
    patcher = threading.Thread(target=patching.apply, args=(first,), kwargs={"eager": True}, daemon=True)
    importer.start()
    while "toyhost.functions" not in sys.modules:
        pass
    patcher.start()
    importer.join(20), patcher.join(20)
    assert not importer.is_alive() and not patcher.is_alive()
    assert is_ours(functions().logprobs)


def test_unpatch_while_another_thread_compares(toyhost):
    reached, go = threading.Event(), threading.Event()

    def build(original):
        reached.set()
        go.wait(20)
        return SEAMS[0].build(original)

    host = dataclasses.replace(toyhost, seams=(dataclasses.replace(SEAMS[0], build=build),))
    found = []
    patcher = threading.Thread(target=lambda: found.append(patching.apply(host, eager=True)), daemon=True)
    patcher.start()
    assert reached.wait(20)
    assert patching.apply(host, eager=True).seams[0].note == "for another thread, which compares it"
    patching.remove(host)
    go.set()
    patcher.join(20)
    assert found[0].seams[0].note == "unpatched meanwhile" and not is_ours(functions().logprobs)


def test_patch_inside_the_import_of_a_module(toyhost, tmp_path):
    """Its finder has been asked already: nothing will call back."""
    path = tmp_path / "toyhost" / "functions.py"
    path.write_text("import fastrlhf_test_hook\nfastrlhf_test_hook.patch()\n" + path.read_text())
    hook = types.ModuleType("fastrlhf_test_hook")
    hook.patch = lambda: reports.append(patching.apply(toyhost, eager=True))
    reports = []
    sys.modules["fastrlhf_test_hook"] = hook
    try:
        functions()
    finally:
        del sys.modules["fastrlhf_test_hook"]
    note = reports[0].seams[0].note
    assert note == "toyhost.functions is being imported: call patch again afterwards"
    assert patching.apply(toyhost, eager=True).seams[0].state == "live"


def test_a_module_that_there_is_not(toyhost):
    gone = dataclasses.replace(SEAMS[0], module="toyhost.nothere.at_all", on_import=True)
    host = dataclasses.replace(toyhost, seams=(gone, SEAMS[5]))
    nothing, late = patching.apply(host, eager=True).seams
    assert nothing.state == "not live" and nothing.note == "there is no module toyhost.nothere.at_all"
    assert late.state == "waiting" and "toyhost.late" not in sys.modules
    assert exists("json.decoder") and exists("toyhost.trainer") and not exists("nothere.at_all")


def test_other_modules_that_took_ours_are_given_the_hosts(toyhost):
    original = functions().logprobs
    patching.apply(toyhost, eager=True)
    users = types.ModuleType("a_users_script")
    users.logprobs = functions().logprobs
    sys.modules["a_users_script"] = users
    try:
        patching.remove(toyhost)
    finally:
        del sys.modules["a_users_script"]
    assert functions().logprobs is users.logprobs is original


def test_a_module_that_is_waited_for_can_be_looked_at(toyhost):
    patching.apply(toyhost, eager=False)
    loader = importlib.util.find_spec("toyhost.functions").loader
    assert "def logprobs" in loader.get_source("toyhost.functions") and not loader.is_package("toyhost.functions")
    assert runpy.run_module("toyhost.functions")["wrong"]
    assert is_ours(functions().logprobs) and "The host's" in inspect.getsource(sys.modules["toyhost.functions"])
