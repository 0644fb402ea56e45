"""The weight-transfer engine that vLLM's workers run. vLLM imports this in each of its processes, by the entry point group
`vllm.general_plugins`; nothing else may.

Checked against the recorded contract only; never run here.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from .foreign import device_key
from .vllm import NAME


@dataclass
class InitInfo:
    """`handles`: by GPU UUID without prefix, what `vllm.exported` makes of the staging buffer."""

    handles: dict[str, list[Any]]
    nbytes: int


@dataclass
class UpdateInfo:
    epoch: int
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    offsets: list[int]
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("dtype_names", "shapes", "offsets"):
            if len(getattr(self, name)) != len(self.names):
                raise ValueError(f"{name}: expected {len(self.names)}, one for each name, got {len(getattr(self, name))}")
        if len(set(self.names)) != len(self.names):
            raise ValueError("names: one comes twice")


def unpacked(buffer: Tensor, info: UpdateInfo) -> list[tuple[str, Tensor]]:
    """Copies of a bucket's tensors: vLLM keeps what it is given until it has counted every element of a module, of a padded one
    until the end, when the buffer holds others."""
    out = []
    for name, dtype_name, shape, at in zip(info.names, info.dtype_names, info.shapes, info.offsets, strict=True):
        dtype = getattr(torch, dtype_name)
        size = dtype.itemsize * int(torch.Size(shape).numel())
        if at < 0 or at + size > buffer.numel() or at % dtype.itemsize:
            raise ValueError(f"{name}: bytes {at}..{at + size} do not lie in the buffer of {buffer.numel()} as {dtype}")
        out.append((name, buffer[at : at + size].view(dtype).view(shape).clone()))
    return out


def opened(handles: dict[str, list[Any]], device: torch.device) -> Tensor:
    """The staging buffer of the trainer on this worker's GPU."""
    key = device_key(device, prefix=False)
    known = {k.removeprefix("GPU-"): v for k, v in handles.items()}
    if key not in known:
        raise ValueError(f"handles: none for GPU {key}, only for {sorted(known)}: the trainer and this worker share no GPU")
    size, stride, offset, *rest = known[key]
    return rebuild_cuda_tensor(
        Tensor, torch.Size(size), tuple(stride), offset, torch.storage.TypedStorage, torch.uint8, device.index, *rest
    )


def give_up(reload: Any, model: Any, config: Any) -> None:
    """Puts back what the kernels had under modules that an update left half loaded. Without it the next update would pass them
    over, count on from where they stopped, and drop what comes when they seem complete."""
    for module in model.modules():
        info = reload.get_layerwise_info(module)
        if info.kernel_tensors is not None:
            info.load_numel, info.load_numel_total, info.loaded_weights = 0, info.load_numel_total or 0, []
    reload.finalize_layerwise_reload(model, config)


def make_engine(base: Any, reload: Any) -> Any:
    """The class, over vLLM's `WeightTransferEngine` and its module of layerwise reloading."""

    class FastrlhfWeightTransferEngine(base):  # type: ignore[misc]
        init_info_cls, update_info_cls = InitInfo, UpdateInfo
        supports_draft_weight_update = False

        def init_transfer_engine(self, init_info: InitInfo) -> None:
            self._buffer: Tensor | None = opened(init_info.handles, self.device)
            if self._buffer.numel() != init_info.nbytes:
                raise ValueError(f"nbytes: the buffer has {self._buffer.numel()}, expected {init_info.nbytes}")
            self._addresses: dict[str, int] | None = None

        def start_weight_update(self) -> None:
            if self._addresses is None:
                self._addresses = {n: p.data_ptr() for n, p in self.model.named_parameters()}
            self._epoch: int | None = None
            give_up(reload, self.model, self.model_config)
            reload.initialize_layerwise_reload(self.model)

        def receive_weights(self, update_info: UpdateInfo) -> None:
            if self._epoch is None:
                self._epoch = update_info.epoch
            if update_info.epoch != self._epoch:
                raise RuntimeError(f"epoch: {update_info.epoch} in an update that began with {self._epoch}")
            assert self._buffer is not None
            self.model.load_weights(unpacked(self._buffer, update_info))

        def finish_weight_update(self) -> None:
            try:
                reload.finalize_layerwise_reload(self.model, self.model_config)
            except BaseException:
                give_up(reload, self.model, self.model_config)  # the session stays open: the next finish has to end it
                raise
            moved = [
                n for n, p in self.model.named_parameters() if p.data_ptr() != (self._addresses or {}).get(n, p.data_ptr())
            ]
            if moved:  # a captured CUDA graph would go on with the old memory
                raise RuntimeError(f"{moved[0]}: lies elsewhere after the update ({len(moved)} in all)")

        def shutdown(self) -> None:
            self._buffer = None

    return FastrlhfWeightTransferEngine


def register() -> None:
    """Called by vLLM, also where nobody wants this engine: a vLLM that has no such thing is left alone."""
    try:
        base = importlib.import_module("vllm.distributed.weight_transfer.base").WeightTransferEngine
        factory = importlib.import_module("vllm.distributed.weight_transfer.factory").WeightTransferEngineFactory
        reload = importlib.import_module("vllm.model_executor.model_loader.reload.layerwise")
    except (ImportError, AttributeError):
        return
    if NAME not in factory._registry:
        factory.register_engine(NAME, make_engine(base, reload))
