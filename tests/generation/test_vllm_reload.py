"""Our worker over vLLM's own layerwise reload, from the files of its unpacked wheel (FASTRLHF_ENGINE_FILES=vllm=/path); what that
imports of the rest of vLLM is stood in for."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from fastrlhf.generation import vllm_worker
from fastrlhf.generation.foreign import Staging, buckets
from torch import Tensor, nn

FILES = dict(p.split("=", 1) for p in os.environ.get("FASTRLHF_ENGINE_FILES", "").split(",") if p)
LOADER = "vllm.model_executor.model_loader"
WIDTH, LIMIT = 32, 41_000  # elements; bytes: two layers


class Quantise:
    """vLLM's QuantizeMethodBase."""

    fails = False

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.fails:
            raise RuntimeError("no memory to quantise")


def default_loader(param: Tensor, loaded_weight: Tensor) -> None:
    assert param.shape == loaded_weight.shape
    param.data.copy_(loaded_weight)


@pytest.fixture
def reload(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if "vllm" not in FILES:
        pytest.skip("no files of vLLM in FASTRLHF_ENGINE_FILES")
    logger = SimpleNamespace(debug=lambda *a: None, warning=logging.warning, warning_once=lambda *a: None)
    never = type("Never", (), {})
    stubs: dict[str, dict[str, Any]] = {
        "vllm": {}, "vllm.config": {"ModelConfig": object}, "vllm.logger": {"init_logger": lambda name: logger},
        "vllm.model_executor": {}, "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.attention": {"is_deferred_attention_layer": lambda layer: False},
        "vllm.model_executor.layers.quantization": {},
        "vllm.model_executor.layers.quantization.base_config": {"QuantizeMethodBase": Quantise},
        "vllm.model_executor.layers.quantization.online": {},
        "vllm.model_executor.layers.quantization.online.fp8": {"OnlineLinearBase": never},
        "vllm.model_executor.layers.quantization.online.moe_base": {"OnlineMoEMethodBase": never},
        LOADER: {}, f"{LOADER}.utils": {"online_quantization_timing_context": None},
        f"{LOADER}.weight_utils": {"default_weight_loader": default_loader}, f"{LOADER}.reload": {},
    }  # fmt: skip
    for name, names in stubs.items():
        module = ModuleType(name)
        module.__path__ = [str(Path(FILES["vllm"], *name.split(".")))] if name.endswith("reload") else []
        module.__dict__.update(names)
        monkeypatch.setitem(sys.modules, name, module)
    yield importlib.import_module(f"{LOADER}.reload.layerwise")
    for name in [n for n in sys.modules if n.startswith(f"{LOADER}.reload.")]:
        del sys.modules[name]


class Embedding(nn.Module):
    """Rows are padded to a multiple of 64 and filled as vLLM's VocabParallelEmbedding does: what is filled is not counted."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(-(-rows // 64) * 64, WIDTH), requires_grad=False)
        self.weight.weight_loader = self.load  # type: ignore[attr-defined]

    def load(self, param: Tensor, loaded_weight: Tensor) -> None:
        param[: len(loaded_weight)].data.copy_(loaded_weight)
        param[len(loaded_weight) :].data.fill_(0)


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH, WIDTH), requires_grad=False)
        self.scale = nn.Parameter(torch.zeros(WIDTH), requires_grad=False)
        self.quant_method = Quantise()


class Model(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.embed_tokens = Embedding(rows)
        self.layers = nn.ModuleList(Linear() for _ in range(8))
        self.fails_at = ""

    def load_weights(self, weights: list[tuple[str, Tensor]]) -> None:
        params = dict(self.named_parameters())
        for name, tensor in weights:
            if name == self.fails_at:
                raise RuntimeError(f"{name}: out of memory")
            param = params[name]
            getattr(param, "weight_loader", default_loader)(param, tensor)


class Worker:
    """One refit after another, over a staging buffer, as the trainer and vLLM's worker would."""

    def __init__(self, reload: Any, rows: int) -> None:
        self.model = Model(rows)
        reload.record_metadata_for_reloading(self.model)
        base = type("Base", (), {"__init__": lambda self, model: self.__dict__.update(model=model, model_config=None)})
        self.engine = vllm_worker.make_engine(base, reload)(self.model)
        names = [f"layers.{i}.{kind}" for i in range(8) for kind in ("weight", "scale")]
        self.source = {"embed_tokens.weight": torch.zeros(rows, WIDTH)} | {n: self.param(n).clone() for n in names}
        self.staging = Staging(max(LIMIT, rows * WIDTH * 4), torch.device("cpu"))
        self.engine._buffer, self.engine._addresses = self.staging.buffer, None
        self.addresses = {n: p.data_ptr() for n, p in self.model.named_parameters()}

    def param(self, name: str) -> Tensor:
        return dict(self.model.named_parameters())[name]

    def refit(self, epoch: int) -> None:
        for t in self.source.values():
            t.normal_()
        self.engine.start_weight_update()
        for bucket in buckets(self.source.items(), LIMIT):
            names, tensors = zip(*bucket.tensors, strict=True)
            shapes, at = [list(t.shape) for t in tensors], self.staging.pack(bucket)
            self.engine.receive_weights(vllm_worker.UpdateInfo(epoch, list(names), ["float32"] * len(names), shapes, at))
        self.engine.finish_weight_update()

    def wrong(self) -> list[str]:
        return [n for n, t in self.source.items() if not torch.equal(self.param(n)[: len(t)], t)]


@pytest.mark.parametrize("rows", [256, 301])
def test_a_padded_vocabulary_is_loaded_from_what_was_sent(reload: Any, rows: int) -> None:
    worker = Worker(reload, rows)
    for epoch in (1, 2):
        worker.refit(epoch)
        assert not worker.wrong() and not worker.param("embed_tokens.weight")[rows:].any()


@pytest.mark.parametrize("at", ["layers.3.scale", "layers.3.weight", "embed_tokens.weight", "layers.7.scale"])
def test_the_next_refit_heals_one_that_failed_in_a_load(reload: Any, at: str) -> None:
    worker = Worker(reload, 256)
    worker.refit(1)
    worker.model.fails_at = at
    with pytest.raises(RuntimeError, match="out of memory"):
        worker.refit(2)
    worker.model.fails_at = ""
    worker.refit(3)
    assert not worker.wrong() and worker.addresses == {n: p.data_ptr() for n, p in worker.model.named_parameters()}


def test_the_next_refit_heals_one_whose_loads_cannot_be_replayed(reload: Any) -> None:
    """What raised once is kept with the other loads of its module, and raises again when they are replayed."""
    worker = Worker(reload, 256)
    whole, worker.source["layers.3.scale"] = worker.source["layers.3.scale"], torch.zeros(WIDTH + 1)
    for epoch in (1, 2):
        with pytest.raises(AssertionError):
            worker.refit(epoch)
    worker.source["layers.3.scale"] = whole
    worker.refit(3)
    assert not worker.wrong()


def test_the_next_refit_heals_one_that_failed_in_processing(reload: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(reload, 256)
    worker.model.layers[3].quant_method.fails = True
    with pytest.raises(RuntimeError, match="no memory to quantise"):
        worker.refit(1)
    worker.model.layers[3].quant_method.fails = False
    worker.refit(2)
    assert not worker.wrong()
    restore, calls = reload.restore_layer_on_meta, []

    def half(layer: Any, info: Any) -> None:
        calls.append(layer)
        if len(calls) == 4:
            raise RuntimeError("no memory for meta")
        restore(layer, info)

    monkeypatch.setattr(reload, "restore_layer_on_meta", half)
    with pytest.raises(RuntimeError, match="no memory for meta"):
        worker.refit(3)
    worker.refit(4)
    assert not worker.wrong() and worker.addresses == {n: p.data_ptr() for n, p in worker.model.named_parameters()}


def test_a_session_that_could_not_be_finished_can_be_ended(reload: Any) -> None:
    """vLLM keeps it open where its finish raises: the next finish has to succeed."""
    worker = Worker(reload, 256)
    worker.source.pop("layers.3.scale")
    worker.model.layers[3].quant_method.fails = True  # as a module that did not get all is processed, at the end
    with pytest.raises(RuntimeError, match="no memory to quantise"):
        worker.refit(1)
    worker.engine.finish_weight_update()
    assert worker.addresses == {n: p.data_ptr() for n, p in worker.model.named_parameters()}
