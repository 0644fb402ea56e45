"""Engines that are not here, as strict as their recorded contracts: signatures, states and rules are enforced, and what an
engine would do wrong after a misuse, these do."""

from __future__ import annotations

import inspect
import itertools
import math
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from fastrlhf.generation import EmbeddedEngine, Sampling
from fastrlhf.generation.tensorrt_llm_worker import extension
from fastrlhf.generation.vllm_worker import make_engine
from fastrlhf.models import Decoder
from fastrlhf.models.checkpoint import _loaders, named_weights
from fastrlhf.refit import contract
from torch import Tensor


def bind(parameters: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """TypeError unless a call fits recorded parameters."""
    kinds, keyword_only = [], False
    for word in parameters:
        if word in ("self", "cls"):
            continue
        if word == "*":
            keyword_only = True
            continue
        name = word.strip("*=")
        kind = inspect.Parameter.KEYWORD_ONLY if keyword_only else inspect.Parameter.POSITIONAL_OR_KEYWORD
        if word.startswith("**"):
            kind = inspect.Parameter.VAR_KEYWORD
        kinds.append(inspect.Parameter(name, kind, default=None if word.endswith("=") else inspect.Parameter.empty))
    inspect.Signature(kinds).bind(*args, **kwargs)


class Strict:
    """Calls by name: bound to the signature, allowed by the state, then done by `do_<name>`."""

    def __init__(self, engine: str) -> None:
        self.contract = contract.load(engine)
        self.state = self.contract.start
        self.calls: list[str] = []
        self.hangs_at, self.released = "", threading.Event()
        self.asleep: set[str] = set()
        self.room = True  # for more than the weights

    def hang(self, name: str) -> None:
        """A worker that hangs, until it is released."""
        if name == self.hangs_at:
            self.released.wait(20)

    def wake(self, tags: list[str] | None) -> None:
        tags = sorted(self.asleep) if tags is None else tags
        if not self.room and set(tags) - {"weights", "model"}:
            raise RuntimeError("CUDA out of memory")
        self.asleep -= set(tags)

    def awake(self, *tags: str) -> None:
        if self.asleep & set(tags or self.asleep):
            raise RuntimeError(f"an illegal memory access: {sorted(self.asleep)} asleep")

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith(("do_", "__")) or not hasattr(type(self), "do_" + name):
            raise AttributeError(f"the contract has no {name}")

        def call(*args: Any, **kwargs: Any) -> Any:
            bind(self.contract.parameters(name), args, kwargs)
            self.hang(name)
            self.calls.append(name)
            after = self.contract.states[self.state].get(name)
            if after is None:
                return self.refuse(name)
            before, self.state = self.state, after
            try:
                return getattr(self, "do_" + name)(*args, **kwargs)
            except BaseException:
                self.state = self.failed(name, before)
                raise

        return call

    def refuse(self, name: str) -> Any:
        raise RuntimeError(f"{name} while {self.state}")

    def failed(self, name: str, before: str) -> str:
        return before


class Model:
    """What an engine holds: weights that are written as they come, and a prefix cache that remembers completions."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.engine = EmbeddedEngine(decoder)
        self.wanted = {n: tuple(t.shape) for n, t in named_weights(decoder)}
        self._loaders = _loaders(decoder)
        self.got: set[str] = set()
        self.cache: dict[Any, Any] = {}
        self.fails_at = ""

    def begin(self) -> None:
        self.got = set()

    def load_weights(self, weights: list[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            if name not in self.wanted or tuple(tensor.shape) != self.wanted[name]:
                raise ValueError(f"{name}: not a tensor of this model, or of shape {tuple(tensor.shape)}")
            if name in self.got:
                raise ValueError(f"{name}: came twice")
            self.got.add(name)
            self.load(name, tensor)

    def load(self, name: str, tensor: Tensor) -> None:
        if name == self.fails_at:
            raise RuntimeError(f"{name}: out of memory")
        self._loaders[name](tensor)

    def finish(self) -> None:
        if missing := self.wanted.keys() - self.got:
            raise RuntimeError(f"{len(missing)} weights did not come: their modules are left unprocessed")

    def draw(self, prompts: list[list[int]], samplings: list[Sampling], seeds: list[int]) -> list[list[Any]]:
        out = []
        for prompt, sampling, seed in zip(prompts, samplings, seeds, strict=True):
            key = (tuple(prompt), sampling, seed)
            if key not in self.cache:
                self.cache[key] = self.engine.generate([prompt], sampling, seeds=[seed])[0]
            out.append(self.cache[key])
        return out

    def drop(self) -> None:
        with torch.no_grad():
            for p in self.decoder.parameters():
                p.fill_(float("nan"))


# --------------------------------------------------------------------------------------------------------------------- vLLM

SHARED: dict[bytes, Tensor] = {}  # handles of memory, in place of CUDA's


def reduce_shared(t: Tensor) -> tuple[Any, tuple[Any, ...]]:
    """As torch reduces a CUDA tensor."""
    key = str(t.data_ptr()).encode()
    SHARED[key] = t
    return rebuild_shared, (
        type(t), t.size(), t.stride(), t.storage_offset(), torch.storage.TypedStorage, t.dtype, 0,
        key, t.untyped_storage().nbytes(), 0, t.requires_grad, b"counter", 0, b"event", True,
    )  # fmt: skip


def rebuild_shared(
    cls: Any, size: Any, stride: Any, offset: int, storage: Any, dtype: Any, device: Any, handle: bytes, *rest: Any
) -> Tensor:
    assert (cls, storage, len(rest)) == (Tensor, torch.storage.TypedStorage, 7)
    t = SHARED[handle]
    assert (size, stride, offset, dtype) == (t.size(), t.stride(), t.storage_offset(), t.dtype)
    return t


def carried(value: Any) -> Any:
    """What comes out at the other end of vLLM's msgpack: TypeError for a class or a dtype, lists for tuples."""
    if type(value) in (list, tuple):
        return [carried(v) for v in value]
    if type(value) is dict:
        return {carried(k): carried(v) for k, v in value.items()}
    if value is not None and type(value) not in (bool, int, float, str, bytes):
        raise TypeError(f"Object of type {type(value)} is not serializable")
    return value


@dataclass
class Parameters:
    """vLLM's and TensorRT-LLM's SamplingParams, of the fields that the contract names."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int = 16
    logprobs: int | None = None
    detokenize: bool = True
    include_stop_str_in_output: bool = False

    def sampling(self) -> Sampling:
        assert self.ignore_eos and self.logprobs == 0
        return Sampling(self.n, self.max_tokens, self.temperature, self.top_k or 0, self.top_p, self.min_p,
                        tuple(self.stop_token_ids or ()), tuple(self.stop or ()))  # fmt: skip


def outputs_of(groups: list[list[Any]]) -> list[Any]:
    def output(c: Any) -> Any:
        logprobs = [{t: SimpleNamespace(logprob=x)} for t, x in zip(c.tokens, c.logprobs, strict=True)]
        return SimpleNamespace(token_ids=tuple(c.tokens), logprobs=logprobs, finish_reason=c.finish_reason)

    return [SimpleNamespace(outputs=[output(c) for c in group]) for group in groups]


class WorkerBase:
    """The lifecycle that vLLM's own base class and worker give an engine."""

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: Any) -> None:
        self.config, self.device, self.model, self.model_config = config, device, model, None

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.update_info_cls(**update_info))  # type: ignore[attr-defined]


FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


@dataclass
class Loading:
    """vLLM's LayerReloadingInfo."""

    load_numel: int = 0
    load_numel_total: int | None = None
    loaded_weights: list[tuple[str, Tensor]] = field(default_factory=list)
    kernel_tensors: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None


class Module:
    """`names`: of the tensors it is loaded from; `numel`: of its parameters, rows of padding among them."""

    def __init__(self, names: list[str], numel: int) -> None:
        self.names, self.numel, self.info = names, numel, Loading()


class Layerwise(Model):
    """vLLM's model and its layerwise reload: a load is put off until the last element of its module has come, or to the end
    where padding never does; a module that is being loaded is not made ready again, and one that is done takes no more."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        groups: dict[str, list[str]] = {}
        for name in self.wanted:
            owner, _, last = name.rpartition(".")[0].rpartition(".")
            groups.setdefault(f"{owner}.{FUSED.get(last, last)}", []).append(name)
        self._modules = [Module(names, sum(map(self._numel, names))) for names in groups.values()]

    def _numel(self, name: str) -> int:
        rows, *rest = self.wanted[name]
        padded = -(-rows // 64) * 64 if "embed_tokens" in name or "lm_head" in name else rows
        return math.prod([padded, *rest])

    def modules(self) -> list[Module]:
        return self._modules

    def named_parameters(self) -> Any:
        return self.decoder.named_parameters()

    def begin(self) -> None:
        for module in self._modules:
            if module.info.load_numel_total is None:
                module.info = Loading(0, module.numel, [], ({}, {}))

    def load_weights(self, weights: list[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            if name not in self.wanted or tuple(tensor.shape) != self.wanted[name]:
                raise ValueError(f"{name}: not a tensor of this model, or of shape {tuple(tensor.shape)}")
            module = next(m for m in self._modules if name in m.names)
            info = module.info
            if info.load_numel_total is None:
                continue
            info.loaded_weights.append((name, tensor))
            if name == self.fails_at:
                raise RuntimeError(f"{name}: out of memory")
            info.load_numel += tensor.numel()
            if info.load_numel >= info.load_numel_total:
                self._process(module)

    def _process(self, module: Module) -> None:
        for name, tensor in module.info.loaded_weights:
            self.load(name, tensor)
        module.info = Loading()

    def finish(self) -> None:
        for module in self._modules:
            if module.info.load_numel:
                self._process(module)
            module.info = Loading()


class FakeVLLM(Strict):
    def __init__(self, decoder: Decoder, **sizes: int) -> None:
        super().__init__("vllm")
        parallel = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1} | sizes
        self.llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(parallel_config=SimpleNamespace(**parallel)))
        self.model = Layerwise(decoder)
        reload = SimpleNamespace(
            initialize_layerwise_reload=lambda model: model.begin(),
            finalize_layerwise_reload=lambda model, config: model.finish(),
            get_layerwise_info=lambda module: module.info,
        )
        self.worker = make_engine(WorkerBase, reload)(None, None, torch.device("cpu"), self.model)
        self.version: str | None = None
        self.running = False

    def failed(self, name: str, before: str) -> str:
        return "idle" if name == "update_weights" else before

    def do_init_weight_transfer_engine(self, request: dict[str, Any]) -> None:
        self.worker.init_transfer_engine(self.worker.init_info_cls(**carried(request["init_info"])))

    def do_start_weight_update(self) -> None:
        self.awake("weights")
        self.worker.start_weight_update()

    def do_update_weights(self, request: dict[str, Any]) -> None:
        self.worker.update_weights(carried(request["update_info"]))

    def do_finish_weight_update(self, weight_version: str | None = None) -> None:
        self.worker.finish_weight_update()
        self.version = weight_version

    def do_shutdown_weight_transfer_engine(self) -> None:
        self.worker.shutdown()

    def do_reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        if self.running:
            return False
        self.model.cache.clear()
        return True

    def do_sleep(self, level: int = 1, mode: str = "abort") -> None:
        self.asleep = {"weights", "kv_cache"}
        if level >= 2:
            self.model.drop()

    def do_wake_up(self, tags: list[str] | None = None) -> bool:
        self.wake(tags)
        return not self.asleep

    def do_generate(self, prompts: Any, sampling_params: Any = None, *, use_tqdm: bool = True) -> list[Any]:
        self.awake()
        return outputs_of(
            self.model.draw([p["prompt_token_ids"] for p in prompts], [s.sampling() for s in sampling_params],
                            [s.seed for s in sampling_params])
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------- SGLang


@dataclass
class Metadata:
    name: str
    shape: torch.Size
    dtype: torch.dtype
    start_idx: int
    end_idx: int
    numel: int


HANDLES = (f"bucket {i}".encode() for i in itertools.count())


def flatten(tensors: list[tuple[str, Tensor]]) -> bytes:
    """As FlattenedTensorBucket and MultiprocessingSerializer do: bytes back to back."""
    at, metadata = 0, []
    for name, t in tensors:
        metadata.append(Metadata(name, t.shape, t.dtype, at, at + t.nbytes, t.nbytes))
        at += t.nbytes
    flat = torch.cat([t.detach().contiguous().flatten().view(torch.uint8) for _, t in tensors])
    key, SHARED[key] = next(HANDLES), flat
    return pickle.dumps({"flattened_tensor": key, "metadata": metadata})


class FakeSGLang(Strict):
    def __init__(self, decoder: Decoder, tp: int = 1) -> None:
        super().__init__("sglang")
        self.model, self.tp, self.running = Model(decoder), tp, False

    def refuse(self, name: str) -> Any:
        if name in ("begin_weight_update", "update_weights_from_tensor", "end_weight_update"):
            return False, f"{name} out of order"
        return super().refuse(name)

    def do_begin_weight_update(self, selector: str = "all") -> tuple[bool, str]:
        self.awake("weights")
        self.model.begin()
        return True, "Success"

    def do_update_weights_from_tensor(
        self, named_tensors: list[bytes], load_format: str | None = None, flush_cache: bool = True
    ) -> tuple[bool, str]:
        assert load_format == "flattened_bucket" and len(named_tensors) == self.tp and not flush_cache
        opened = [pickle.loads(payload) for payload in named_tensors]  # each rank its own
        if len({payload["flattened_tensor"] for payload in opened}) != self.tp:
            raise RuntimeError("a handle was opened twice: its destructor hangs")
        flat, *_ = [SHARED.pop(payload["flattened_tensor"]) for payload in opened]
        tensors = []
        for m in opened[0]["metadata"]:
            if m.start_idx % m.dtype.itemsize:
                return False, f"{m.name}: offset {m.start_idx} is no multiple of {m.dtype.itemsize}"
            tensors.append((m.name, flat[m.start_idx : m.end_idx].view(m.dtype).reshape(m.shape)))
        try:
            self.model.load_weights(tensors)
        except (RuntimeError, ValueError) as error:
            return False, str(error)
        return True, "Success"

    def do_end_weight_update(self) -> tuple[bool, str]:
        try:
            self.model.finish()
        except RuntimeError as error:
            return False, str(error)
        return True, "Success"

    def do_flush_cache(self) -> Any:
        if self.running:
            return SimpleNamespace(success=False, message="requests are still running or queued")
        self.model.cache.clear()
        return SimpleNamespace(success=True, message="")

    def do_update_weights_from_ipc(self, zmq_handles: dict[str, str], flush_cache: bool = True) -> tuple[bool, str]:
        """Receives as checkpoint-engine's worker does, by its contract."""
        import zmq

        states, state = contract.load("checkpoint-engine").states, "new"
        (address,) = zmq_handles.values()
        context = zmq.Context()
        worker = context.socket(zmq.REP)
        worker.connect(address)
        self.model.begin()
        buffer = None
        try:
            while state != "ended":
                payload = worker.recv_pyobj()
                kind = {tuple: "handle", list: "bucket", type(None): "none"}.get(type(payload), "exception")
                state = states[state][kind]
                try:
                    if kind == "exception":
                        raise payload
                    if kind == "handle":
                        rebuild, arguments = payload
                        buffer = rebuild(*arguments)
                    elif kind == "bucket":
                        assert all(e["offset"] % 256 == 0 for e in payload)
                        self.model.load_weights([
                            (e["name"], buffer[e["offset"] : e["offset"] + e["dtype"].itemsize * e["shape"].numel()]
                             .view(e["dtype"]).view(e["shape"]).clone()) for e in payload
                        ])  # fmt: skip
                    elif state == "released":
                        buffer = None
                    else:
                        self.model.finish()
                except RuntimeError as error:
                    if kind == "exception":
                        return False, str(error)
                    worker.send_string(f"Traceback\n{error}")
                    continue
                worker.send(b"")
            return True, "Succeeded to update model weights."
        finally:
            worker.close()
            context.term()

    def do_release_memory_occupation(self, tags: list[str] | None = None) -> None:
        self.asleep = {"weights", "kv_cache", "cuda_graph"}
        self.model.drop()

    def do_resume_memory_occupation(self, tags: list[str] | None = None) -> None:
        self.wake(tags)

    def do_generate(self, *, input_ids: Any = None, sampling_params: Any = None, return_logprob: bool = False) -> list[Any]:
        assert return_logprob
        self.awake()
        drawn = []
        for given in sampling_params:
            known = {"temperature", "top_p", "min_p", "max_new_tokens", "top_k", "stop", "stop_token_ids", "ignore_eos",
                     "no_stop_trim", "sampling_seed"}  # fmt: skip
            assert set(given) <= known
            drawn.append(Sampling(1, given["max_new_tokens"], given["temperature"], max(0, given["top_k"]), given["top_p"],
                                  given["min_p"], tuple(given["stop_token_ids"])))  # fmt: skip
        groups = self.model.draw(input_ids, drawn, [g.get("sampling_seed", 0) for g in sampling_params])
        return [
            {"output_ids": g[0].tokens, "meta_info": {
                "finish_reason": {"type": g[0].finish_reason},
                "output_token_logprobs": [(x, t, None) for t, x in zip(g[0].tokens, g[0].logprobs, strict=True)],
            }}
            for g in groups
        ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- TensorRT-LLM


class WorkerExtension:
    """TensorRT-LLM's, as the contract has it."""

    def __init__(self, model: Model) -> None:
        self.model, self.reloading, self.buckets = model, False, 0

    def pre_reload_weights(self) -> None:
        self.model.begin()
        self.reloading, self.buckets = True, 0

    def update_weights(self, ipc_handles: Any = None) -> None:
        if not self.reloading:
            raise RuntimeError("update_weights before pre_reload_weights")
        if ipc_handles is None:
            if not self.buckets:
                raise RuntimeError("finalised before any bucket")
            self.model.finish()
            self.model.cache.clear()
            self.reloading = False
            return
        ((key, entries),) = ipc_handles.items()
        assert key == "GPU-cpu"
        weights = []
        for name, (rebuild, arguments) in entries:
            weights.append((name, rebuild(*arguments[:6], 0, *arguments[7:])))
        self.buckets += 1
        self.model.load_weights(weights)


class FakeTensorRTLLM(Strict):
    def __init__(self, decoder: Decoder, workers: int = 1) -> None:
        super().__init__("tensorrt-llm")
        self.model, self.workers = Model(decoder), workers
        self.worker = extension(WorkerExtension, lambda _: "GPU-cpu", (rebuild_shared,))(self.model)

    def __getattr__(self, name: str) -> Any:
        if name == "_collective_rpc":
            return self.rpc
        return super().__getattr__(name)

    def rpc(self, *args: Any, **kwargs: Any) -> list[Any]:
        bind(self.contract.parameters("_collective_rpc"), args, kwargs)
        method, args = args[0], kwargs.get("args", ())
        self.hang(method)
        self.calls.append(method)
        if method == "sleep":
            (tags,) = args
            self.asleep |= set(tags)
            if "model" in tags:
                self.model.drop()
            return [True]
        if method == "wakeup":
            self.wake(*args)
            return [True]
        if method == "fastrlhf_begin":
            self.awake("model")
        return [getattr(self.worker, method)(*args)] * self.workers

    def do_generate(self, inputs: Any, sampling_params: Any = None, use_tqdm: bool = True) -> list[Any]:
        self.awake()
        return outputs_of(
            self.model.draw([p["prompt_token_ids"] for p in inputs], [s.sampling() for s in sampling_params],
                            [s.seed for s in sampling_params])
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- Refitter


class FakeTensorRT:
    """The names of the module that the target uses."""

    TensorLocation = SimpleNamespace(HOST="host", DEVICE="device")
    DataType = SimpleNamespace(FLOAT="float32", HALF="float16", BF16="bfloat16", INT8="int8", FP8="fp8", INT32="int32")

    @dataclass
    class Weights:
        dtype: str
        ptr: int
        size: int


class FakeRefitter(Strict):
    """Keeps what was set and reads it again at every refit."""

    def __init__(self, prototypes: dict[str, tuple[str, int]]) -> None:
        super().__init__("tensorrt")
        self.prototypes = prototypes
        self.given: dict[str, Any] = {}
        self.engine: dict[str, Tensor] = {}
        self.refuses = ""
        self.answers = True

    def do_get_all_weights(self) -> list[str]:
        return list(self.prototypes)

    def do_get_missing_weights(self) -> list[str]:
        return [n for n in self.prototypes if n not in self.given]

    def do_get_weights_prototype(self, name: str) -> Any:
        dtype, size = self.prototypes.get(name, ("float32", -1))
        return FakeTensorRT.Weights(dtype, 0, size)

    def do_set_named_weights(self, name: str, weights: Any, location: str = "host") -> bool:
        dtype, size = self.prototypes.get(name, ("", -1))
        if (weights.dtype, weights.size) != (dtype, size) or name == self.refuses:
            return False
        self.given[name] = weights
        return True

    def do_refit_cuda_engine_async(self, stream_handle: int) -> bool:
        import ctypes

        for name, w in self.given.items():
            raw = (ctypes.c_float * w.size).from_address(w.ptr)
            self.engine[name] = torch.tensor(list(raw))
        return self.answers
