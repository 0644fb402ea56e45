"""The extension of TensorRT-LLM's workers: `ray_worker_extension_cls="fastrlhf.generation.tensorrt_llm_worker.Extension"`.

Checked against the recorded contract only; never run here. It is imported in TensorRT-LLM's workers alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor


def extension(base: Any, device_uuid: Callable[[int], str], rebuilds: tuple[Any, ...] = (rebuild_cuda_tensor,)) -> Any:
    """The class, over TensorRT-LLM's `WorkerExtension` and its spelling of a GPU's UUID. Every method answers True; what it
    raises the caller gets.

    Args:
        rebuilds: what handles may name to be called: nothing but these is.
    """

    class Extension(base):  # type: ignore[misc]
        _epoch: int | None = None

        def fastrlhf_ready(self) -> bool:
            return True

        def fastrlhf_begin(self, epoch: int) -> bool:
            """A later epoch takes the place of one whose trainer gave up without a word."""
            if self._epoch is not None and epoch <= self._epoch:
                raise RuntimeError(f"epoch: {self._epoch} is under way, got {epoch}")
            self.pre_reload_weights()
            self._epoch = epoch
            return True

        def fastrlhf_update(self, epoch: int, handles: dict[str, list[tuple[str, tuple[Any, tuple[Any, ...]]]]]) -> bool:
            self._at(epoch)
            for _, (rebuild, _arguments) in [entry for entries in handles.values() for entry in entries]:
                if rebuild not in rebuilds:
                    raise RuntimeError(f"handles: expected torch's rebuild_cuda_tensor, got {rebuild!r}")
            key = device_uuid(torch.cuda.current_device() if torch.cuda.is_available() else 0)
            own = key.removeprefix("GPU-")
            mine = {k.removeprefix("GPU-"): v for k, v in handles.items()}
            if own not in mine:
                raise RuntimeError(f"handles: none for GPU {own}, only for {sorted(mine)}")
            self.update_weights({key: mine[own]})  # as this release spells it
            return True

        def fastrlhf_commit(self, epoch: int) -> bool:
            self._at(epoch)
            self.update_weights(None)
            self._epoch = None
            return True

        def fastrlhf_fail(self, epoch: int) -> bool:
            """There is nothing to roll back; the next refit starts anew."""
            if self._epoch == epoch:
                self._epoch = None
            return True

        def _at(self, epoch: int) -> None:
            if epoch != self._epoch:
                raise RuntimeError(f"epoch: {epoch} is not under way, {self._epoch} is")

    return Extension


def __getattr__(name: str) -> Any:
    """`Extension`, made when TensorRT-LLM asks for it: elsewhere this module can be imported without it."""
    if name != "Extension":
        raise AttributeError(name)
    for module in ("tensorrt_llm.llmapi.rlhf_utils", "tensorrt_llm.rlhf_utils"):
        try:
            base = importlib.import_module(module).WorkerExtension
        except ImportError:
            continue
        globals()["Extension"] = extension(base, importlib.import_module("tensorrt_llm._torch.utils").get_device_uuid)
        return globals()["Extension"]
    raise ImportError("tensorrt_llm: no WorkerExtension in it; 1.2 is the first release that has one")
