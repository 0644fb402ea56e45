"""The sender of checkpoint-engine's wire, which SGLang (`update_weights_from_ipc`) and vLLM's extension of it receive: a REQ
socket over which a shared buffer, then lists of what lies in it, then two None go.

Checked against the recorded contract (`contracts/checkpoint-engine.json`) and over real zmq sockets; not run against an engine.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from ..states import PeerLost, RefitError

ALIGN = 256


class CheckpointEngineSender:
    """
    Args:
        address: where the worker will connect, as ipc://@checkpoint-engine-{GPU uuid}-{n}.sock.
        half: bytes of each of the buffer's two halves.
        timeout: seconds for each answer.
    """

    def __init__(
        self, address: str, half: int, device: torch.device, *, timeout: float = 600.0
    ) -> None:  # fmt: skip
        self._zmq: Any = importlib.import_module("zmq")
        self.half = -(-half // ALIGN) * ALIGN
        self.buffer = torch.empty(2 * self.half, dtype=torch.uint8, device=device)
        self._timeout, self._turn, self._open = timeout, 1, False
        self._context = self._zmq.Context()
        self._socket = self._context.socket(self._zmq.REQ)
        self._socket.setsockopt(self._zmq.LINGER, 0)
        self._socket.bind(address)

    def send(self, tensors: list[tuple[str, Tensor]]) -> None:
        """A bucket into the half that the worker is not reading; it has taken it when this returns.

        Raises:
            RefitError: a bucket larger than a half; what the worker says went wrong.
            PeerLost: no answer in time.
        """
        if not self._open:
            self._ask(reduce_tensor(self.buffer))
            self._open = True
        self._turn = 1 - self._turn
        at, entries = self._turn * self.half, []
        for name, t in tensors:
            if at + t.nbytes > (self._turn + 1) * self.half:
                raise RefitError(f"{name}: does not fit the half buffer of {self.half} bytes")
            self.buffer[at : at + t.nbytes].view(t.dtype).view(t.shape).copy_(t)
            entries.append({"name": name, "shape": t.shape, "dtype": t.dtype, "offset": at})
            at += -(-t.nbytes // ALIGN) * ALIGN
        if self.buffer.is_cuda:
            torch.cuda.current_stream(self.buffer.device).synchronize()
        self._ask(entries)

    def finish(self) -> None:
        """The worker drops the buffer, then runs its post hook."""
        self._ask(None)
        self._ask(None)
        self.close()

    def abort(self, reason: str) -> None:
        """The worker raises this instead of going on."""
        try:
            if self._open:
                self._socket.send_pyobj(RefitError(reason))
        except self._zmq.ZMQError:  # an answer is outstanding: a REQ socket may not send before it has come
            pass
        finally:
            self.close()

    def close(self) -> None:
        self._open = False
        self._socket.close(linger=1000)
        self._context.term()

    def _ask(self, message: Any) -> None:
        self._socket.send_pyobj(message)
        if not self._socket.poll(self._timeout * 1000):
            raise PeerLost(f"checkpoint-engine worker: no answer within {self._timeout:g} s")
        answer = self._socket.recv()
        if answer:
            raise RefitError(f"checkpoint-engine worker: {answer.decode(errors='replace').strip().splitlines()[-1]}")
