"""The watch of processes, with two of them in one: what they hear of one another over a store."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch.distributed as dist
from fastrlhf.parallel import watch
from fastrlhf.parallel.watch import Watch


def stores() -> tuple[dist.Store, dist.Store]:
    """Of two ranks, as torch's rendezvous makes them."""
    first = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    second = dist.TCPStore("127.0.0.1", first.port, is_master=False)
    return dist.PrefixStore("default_pg", first), dist.PrefixStore("default_pg", second)


@contextmanager
def watching(first: dist.Store, second: dist.Store, timeout: float = 0.5, grace: float = 10.0) -> Iterator[tuple[Watch, Watch]]:
    watches = Watch(first, 0, 2, timeout=timeout, grace=grace), Watch(second, 1, 2, timeout=timeout, grace=grace)
    try:
        yield watches
    finally:
        for each in reversed(watches):
            each.close()


@pytest.mark.parametrize("clones", [True, False], ids=["torch 2.7", "torch 2.4"])
def test_a_process_that_waits_for_the_store_is_alive(clones: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not clones:
        monkeypatch.setattr(watch, "hasattr", lambda *_: False, raising=False)
    first, second = stores()
    with watching(first, second) as watches:
        time.sleep(0.2)
        with pytest.raises(RuntimeError):  # as where a communicator's id does not come
            second.wait(["what nobody sets"], timedelta(seconds=1.5))
        assert [w.verdict for w in watches] == [None, None]


def test_a_failure_reaches_the_other() -> None:
    first, second = stores()
    with watching(first, second) as (other, failing):
        failing.fail(ValueError("a reason"))
        assert str(other.explain(RuntimeError())) == "rank 1 failed: ValueError: a reason; this process, rank 0, stops"


@pytest.mark.parametrize("reports", [True, False])
def test_only_a_process_that_has_no_error_to_report_is_stuck(reports: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    first, second = stores()
    with watching(first, second, grace=0.3) as (other, failing):
        if reports:
            other.fail(ValueError("its own"))
        failing.fail(ValueError("a reason"))
        time.sleep(1)
        assert other.verdict is not None and failing.verdict is not None
    assert ended == ([] if reports else [watch.EXIT])
