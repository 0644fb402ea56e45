"""Messages between the two sides: JSON in frames over a UNIX socket, with file descriptors where memory is handed over.

Nothing is unpickled.
"""

from __future__ import annotations

import json
import select
import socket
import struct
from typing import Any

from .states import PeerLost

_HEADER = struct.Struct("<QI")  # bytes of JSON, descriptors
_LIMIT = 1 << 32
Message = dict[str, Any]


class Channel:
    """One end of a connection. One thread sends and one receives. After a `PeerLost` it is closed: an answer that comes late
    can then not be taken for that to a later question."""

    def __init__(self, connection: socket.socket, peer: str) -> None:
        self.socket, self.peer = connection, peer

    def send(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        body = json.dumps(message, separators=(",", ":")).encode()
        try:
            self.socket.settimeout(None)
            header = _HEADER.pack(len(body), len(fds))
            if fds:
                socket.send_fds(self.socket, [header], list(fds))
            else:
                self.socket.sendall(header)
            self.socket.sendall(body)
        except OSError as error:
            raise self._lost(f"it is gone ({error.strerror or error})") from error

    def receive(self, timeout: float | None = None) -> tuple[Message, list[int]]:
        """The next message and its descriptors.

        Raises:
            PeerLost: the other side closed, was killed, or sent nothing for `timeout` seconds.
        """
        try:
            self.socket.settimeout(timeout)
            head, fds, _, _ = socket.recv_fds(self.socket, _HEADER.size, 4)
            if head and len(head) < _HEADER.size:
                head += self._exactly(_HEADER.size - len(head))
            if not head:
                raise self._lost("it is gone")
            size, count = _HEADER.unpack(head)
            if size > _LIMIT or count != len(fds):
                raise self._lost("it does not speak this protocol")
            return json.loads(self._exactly(size)), list(fds)
        except ValueError as error:
            raise self._lost("it does not speak this protocol") from error
        except TimeoutError as error:
            raise self._lost(f"no answer within {timeout:g} s") from error
        except OSError as error:
            raise self._lost(f"it is gone ({error.strerror or error})") from error

    def ask(self, message: Message, timeout: float | None = None) -> Message:
        """Sends and waits for the answer. Closed where that is interrupted: the answer would be taken for the next one's."""
        try:
            self.send(message)
            return self.receive(timeout)[0]
        except BaseException:
            self.close()
            raise

    @property
    def alive(self) -> bool:
        """False where the other side has closed or was killed; asks nothing of it."""
        try:
            watched = select.poll()  # select() takes no descriptor above 1023
            watched.register(self.socket, select.POLLIN)
            return not watched.poll(0) or bool(self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return True
        except (OSError, ValueError):
            return False

    def close(self) -> None:
        self.socket.close()

    def _lost(self, why: str) -> PeerLost:
        self.close()
        return PeerLost(f"{self.peer}: {why}")

    def _exactly(self, size: int) -> bytes:
        out = bytearray(size)
        view, at = memoryview(out), 0
        while at < size:
            n = self.socket.recv_into(view[at:])
            if not n:
                raise self._lost("it is gone")
            at += n
        return bytes(out)
