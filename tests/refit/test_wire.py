"""Connections: their deadlines, and who is gone when."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastrlhf.refit import PeerLost
from fastrlhf.refit.wire import Channel

LARGE = {"kind": "done", "hashes": [2**63] * 40_000}  # more than a socket takes at once


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


def test_a_question_that_nobody_takes_ends_in_time() -> None:
    ours, _theirs = socket.socketpair()
    done: list[BaseException] = []

    def ask() -> None:
        try:
            Channel(ours, "engine").ask(LARGE, 0.2)
        except PeerLost as error:
            done.append(error)

    asks = threading.Thread(target=ask, daemon=True)
    asks.start()
    asks.join(2)
    assert [str(e) for e in done] == ["engine: no answer within 0.2 s"]


def test_an_answer_that_comes_byte_by_byte_is_not_waited_for_longer() -> None:
    ours, theirs = socket.socketpair()
    ended = threading.Event()

    def trickle() -> None:
        theirs.sendall((1000).to_bytes(8, "little") + (0).to_bytes(4, "little"))
        with contextlib.suppress(OSError):
            while not ended.wait(0.05):
                theirs.sendall(b" ")

    threading.Thread(target=trickle, daemon=True).start()
    with within(1), pytest.raises(PeerLost, match=r"no answer within 0\.3 s"):
        Channel(ours, "engine").receive(0.3)
    ended.set()


def test_messages_larger_than_a_socket_takes() -> None:
    ours, theirs = socket.socketpair()
    answers = Channel(theirs, "trainer")

    def answer() -> None:
        for _ in range(3):
            answers.send(answers.receive(5)[0])

    thread = threading.Thread(target=answer)
    thread.start()
    channel = Channel(ours, "engine")
    for _ in range(3):
        assert channel.ask(LARGE, 5) == LARGE
    thread.join()
    assert channel.alive
    theirs.close()
    assert not channel.alive


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux 5.3")
def test_a_process_that_ended_while_a_fork_of_it_holds_the_connection(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    script = (
        "import os, socket, sys, time\n"
        "s = socket.socket(socket.AF_UNIX)\n"
        "s.connect(sys.argv[1])\n"
        "child = os.fork()\n"
        "if child: s.send(child.to_bytes(4, 'little'))\n"
        "time.sleep(60)\n"
    )
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        process = subprocess.Popen([sys.executable, "-c", script, path])
        connection = server.accept()[0]
    child = int.from_bytes(connection.recv(4), "little")
    channel = Channel(connection, "trainer")
    try:
        assert channel.alive
        threading.Timer(0.1, process.kill).start()
        with within(1), pytest.raises(PeerLost, match="trainer: it is gone"):
            channel.receive(5)
        assert not channel.alive
    finally:
        os.kill(child, signal.SIGKILL)
        process.wait()
