"""Processes that watch one another: when one dies or fails, all others stop and say which."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch.distributed as dist

EXIT = 3
"""Status of a process that was stuck in an exchange with one that is gone."""


class Lost(RuntimeError):
    """Another process of the run is gone; the message says which and what is known of it."""


class Watch:
    """A thread that says in the run's store that this process lives, and looks after the next one.

    When a process is silent for `timeout` seconds, or has said why it fails, every other one learns of it within `interval`
    and has `grace` seconds to come out of what it does; then its watch ends it with status EXIT. One that has an error to
    report already is not stuck, and takes the time that it takes.

    Args:
        store: the run's; the watch talks to it over a connection of its own.
        place: a rank -> what to call it.
    """

    def __init__(
        self, store: Any, rank: int, world: int, *, timeout: float, place: Callable[[int], str] = "rank {}".format,
        grace: float = 10.0,
    ) -> None:  # fmt: skip
        self._store = dist.distributed_c10d.PrefixStore("fastrlhf/watch", _own_client(store))
        self.rank, self.world, self.timeout, self.grace, self.place = rank, world, timeout, grace, place
        self.interval = min(1.0, max(0.05, timeout / 10))  # lingering, four of it, must be well under `grace`
        self.verdict: str | None = None
        self._known = threading.Event()
        self.leaves = False  # this process has an error to report
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fastrlhf-watch", daemon=True)
        self._thread.start()

    def fail(self, error: BaseException) -> None:
        """Tell the others why this process fails, if nobody failed before it."""
        self.leaves = True
        if self.verdict is None:
            text = str(error).strip().splitlines()
            self._accuse(f"{self.place(self.rank)} failed: {type(error).__name__}: {text[0] if text else ''}")
            self._linger()

    def explain(self, error: BaseException) -> BaseException:
        """What to raise for an error of an exchange with other processes: who is gone, once it is known."""
        self.leaves = True
        if self._known.wait(self.timeout + 2 * self.interval):
            self._linger()
            return Lost(f"{self.verdict}; this process, {self.place(self.rank)}, stops")
        return error

    def _linger(self) -> None:
        """The first process may keep the store: it stays until the others have read in it why it goes."""
        if self.rank == 0:
            time.sleep(4 * self.interval)

    def close(self) -> None:
        self._stop.set()
        self._thread.join(self.timeout)

    def _accuse(self, text: str) -> None:
        with suppress(RuntimeError):  # the store may be gone with its process; the others see that too
            if not self._store.check(["verdict"]):
                self._store.set("verdict", text)

    def _run(self) -> None:
        following = (self.rank + 1) % self.world
        seen, since, beat = b"", time.monotonic(), 0
        while not self._stop.wait(self.interval):
            try:
                beat += 1
                self._store.set(f"beat/{self.rank}", str(beat))
                key = f"beat/{following}"
                now = self._store.get(key) if self._store.check([key]) else b""
                if now != seen:
                    seen, since = now, time.monotonic()
                elif time.monotonic() - since > self.timeout and now != b"end":
                    self._accuse(f"{self.place(following)} has given no sign of life for {self.timeout:g} s")
                if self._store.check(["verdict"]):
                    self._end(self._store.get("verdict").decode())
                    return
            except RuntimeError as error:
                if not self._stop.is_set():
                    reason = str(error).splitlines()[0]
                    self._end(f"{self.place(0)} or whoever else keeps the run's store is gone ({reason[:100]})")
                return
        with suppress(RuntimeError):
            self._store.set(f"beat/{self.rank}", "end")

    def _end(self, verdict: str) -> None:
        self.verdict = verdict
        self._known.set()
        if not self._stop.wait(self.grace) and not self.leaves:
            print(f"fastrlhf: {verdict}; {self.place(self.rank)} was stuck and ends", file=sys.stderr, flush=True)
            os._exit(EXIT)


def _own_client(store: Any) -> Any:
    """The same store over another connection: who waits for a key of a TCPStore keeps its client to itself until it comes, as
    the making of an NCCL communicator does, and this process would seem dead meanwhile."""
    if hasattr(store, "clone"):  # torch >= 2.7
        return store.clone()
    stores: Any = dist  # torch's types do not export them
    inner = store
    while isinstance(inner, stores.PrefixStore):
        inner = inner.underlying_store
    if not isinstance(inner, stores.TCPStore):
        return store
    client = stores.TCPStore(inner.host, inner.port, is_master=False, wait_for_workers=False, timeout=inner.timeout)
    # the prefixes, which cannot be asked for, tell apart the attempts of a torchrun that starts anew
    return stores.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", client)
