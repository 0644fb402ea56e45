"""Messages between the two sides: JSON in frames over a UNIX socket, with file descriptors where memory is handed over.

Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import time
from collections.abc import Callable
from typing import Any, TypeVar

from .states import PeerLost

_HEADER = struct.Struct("<QI")  # bytes of JSON, descriptors
_CREDENTIALS = struct.Struct("3i")  # process, user, group
_LIMIT = 1 << 32
Message = dict[str, Any]
T = TypeVar("T")


class Deadline:
    """`seconds` from now; None is never."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def milliseconds(self) -> float | None:
        """What is left."""
        return None if self._end is None else max(0.0, 1e3 * (self._end - time.monotonic()))


class Channel:
    """One end of a connection. One thread sends and one receives. After a `PeerLost` it is closed: an answer that comes late
    can then not be taken for that to a later question.

    The other side is gone when its end is closed, or when the process that made the connection has ended, where the kernel
    tells: a fork of it may hold the end open for long."""

    def __init__(self, connection: socket.socket, peer: str) -> None:
        self.socket, self.peer = connection, peer
        self.socket.setblocking(False)
        self._process = _process_behind(connection)

    def send(self, message: Message, fds: tuple[int, ...] = (), timeout: float | None = None) -> None:
        """
        Raises:
            PeerLost: the other side is gone, or has not taken it all within `timeout` seconds.
        """
        self._send(message, fds, Deadline(timeout))

    def receive(self, timeout: float | None = None) -> tuple[Message, list[int]]:
        """The next message and its descriptors.

        Raises:
            PeerLost: the other side is gone, or has not sent it all within `timeout` seconds.
        """
        return self._receive(Deadline(timeout))

    def ask(self, message: Message, timeout: float | None = None) -> Message:
        """Sends and waits for the answer. Closed where that is interrupted: the answer would be taken for the next one's."""
        try:
            deadline = Deadline(timeout)
            self._send(message, (), deadline)
            return self._receive(deadline)[0]
        except BaseException:
            self.close()
            raise

    @property
    def alive(self) -> bool:
        """False where the other side is gone; asks nothing of it."""
        try:
            if self._process is not None and _poll({self._process: select.POLLIN}, 0):
                return False
            return bool(self.socket.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        self.socket.close()
        if self._process is not None:
            process, self._process = self._process, None
            os.close(process)

    def _send(self, message: Message, fds: tuple[int, ...], deadline: Deadline) -> None:
        body = json.dumps(message, separators=(",", ":")).encode()
        header = _HEADER.pack(len(body), len(fds))
        if fds:
            sent = self._when(select.POLLOUT, deadline, lambda: socket.send_fds(self.socket, [header], list(fds)))
            header = header[sent:]
        left = memoryview(header + body)
        while left:
            left = left[self._when(select.POLLOUT, deadline, lambda: self.socket.send(left)) :]

    def _receive(self, deadline: Deadline) -> tuple[Message, list[int]]:
        head, fds, _, _ = self._when(select.POLLIN, deadline, lambda: socket.recv_fds(self.socket, _HEADER.size, 4))
        if not head:
            raise self._lost("it is gone")
        size, count = _HEADER.unpack(head + self._exactly(_HEADER.size - len(head), deadline))
        if size > _LIMIT or count != len(fds):
            raise self._lost("it does not speak this protocol")
        try:
            return json.loads(self._exactly(size, deadline)), list(fds)
        except ValueError as error:
            raise self._lost("it does not speak this protocol") from error

    def _exactly(self, size: int, deadline: Deadline) -> bytes:
        out = bytearray(size)
        left = memoryview(out)
        while left:
            n = self._when(select.POLLIN, deadline, lambda: self.socket.recv_into(left))
            if not n:
                raise self._lost("it is gone")
            left = left[n:]
        return bytes(out)

    def _when(self, event: int, deadline: Deadline, call: Callable[[], T]) -> T:
        """A call on the socket, as soon as it need not wait."""
        while True:
            try:
                return call()
            except BlockingIOError:
                self._wait(event, deadline)
            except OSError as error:
                raise self._lost(f"it is gone ({error.strerror or error})") from error

    def _wait(self, event: int, deadline: Deadline) -> None:
        watched = {self.socket.fileno(): event} | ({} if self._process is None else {self._process: select.POLLIN})
        ready = _poll(watched, deadline.milliseconds)
        if self.socket.fileno() not in ready:
            raise self._lost("it is gone" if ready else f"no answer within {deadline.seconds:g} s")

    def _lost(self, why: str) -> PeerLost:
        self.close()
        return PeerLost(f"{self.peer}: {why}")


def _process_behind(connection: socket.socket) -> int | None:
    """A descriptor that is readable once the process that made the connection has ended. None where that cannot be known, and
    where it is this one."""
    if not hasattr(os, "pidfd_open") or connection.family != socket.AF_UNIX:
        return None
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid = _CREDENTIALS.unpack(credentials)[0]
    if pid in (0, os.getpid()):  # 0: of another namespace
        return None
    with contextlib.suppress(OSError):
        return os.pidfd_open(pid)
    return None


def _poll(watched: dict[int, int], milliseconds: float | None) -> set[int]:
    """Which of the descriptors have their event; select() takes none above 1023."""
    poll = select.poll()
    for descriptor, event in watched.items():
        poll.register(descriptor, event)
    return {descriptor for descriptor, _ in poll.poll(milliseconds)}
