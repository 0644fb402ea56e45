"""The scenario of two processes on one GPU, for a GPU and for memory in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fastrlhf.refit import Session
from fastrlhf.refit.catalogue import Catalogue
from fastrlhf.refit.host import Visit
from fastrlhf.refit.layouts import catalogue_for, layout
from fastrlhf.refit.shapes import model_of
from fastrlhf.refit.states import Weights
from fastrlhf.refit.transports.cuda_ipc import CudaIpc, CudaIpcHost, Device
from fastrlhf.refit.wire import Message
from torch import Tensor

ONE_B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "torch_dtype": "bfloat16", "tie_word_embeddings": True,
}  # fmt: skip
SMALL = {**ONE_B, "vocab_size": 1024, "num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512, "head_dim": 32,
         "num_attention_heads": 8, "num_key_value_heads": 4}  # fmt: skip
READ = "model.layers.1.mlp.gate_up_proj.weight"  # the parameter that the engine computes with


def sides(size: str) -> tuple[Catalogue, Catalogue]:
    model = model_of(ONE_B if size == "1b" else SMALL)
    return catalogue_for(model, layout("tp1", "megatron")), catalogue_for(model, layout("tp1", "engine"))


def tensors(c: Catalogue, fill: float, device: str) -> dict[str, Tensor]:
    return {
        n: torch.full(tuple(s), fill, dtype=torch.bfloat16, device=device)
        for n, s in zip(c.params.names, c.params.shape.tolist(), strict=True)
    }


class Replaying(CudaIpcHost):
    """The engine: one slot, and something captured before any refit that it computes again when it is asked to."""

    def __init__(self, dest: Catalogue, params: dict[str, Tensor], device: Device | None, replay: Callable[[], Tensor]) -> None:
        super().__init__(dest, Weights(1), [params], device)
        self.params, self.replay = params, replay

    def _answers(self, visit: Visit, message: Message, kind: str) -> Message:
        if kind != "replay":
            return super()._answers(visit, message, kind)
        held = {n: [float(t.min()), float(t.max())] for n, t in self.params.items()}
        return {"out": float(self.replay()[0, 0]), "inner": self.params[READ].shape[1], "held": held}


def refits_are_seen(session: Session, target: CudaIpc, held: dict[str, Tensor], versions: range) -> None:
    for version in versions:
        for t in held.values():
            t.fill_(version + 1)
        session.refit(version)
        seen: dict[str, Any] = target._ask({"kind": "replay"}, 60)
        assert seen["out"] == (version + 1) * seen["inner"]
        for name, ends in seen["held"].items():
            assert ends == [version + 1] * 2, name
