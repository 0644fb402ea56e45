"""Adapters of engines that are not here, against strict fakes of their contracts; and the contracts against the engines' files
where there are any: FASTRLHF_ENGINE_FILES names folders of unpacked wheels, as vllm=/path,sglang=/path."""

from __future__ import annotations

import importlib.util
import os
import threading
from concurrent import futures
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from fastrlhf.errors import ConfigError
from fastrlhf.generation import EmbeddedEngine, Sampling, foreign, tensorrt_llm, vllm, vllm_worker
from fastrlhf.generation.foreign import Bucket, Manifest, Staging, buckets
from fastrlhf.generation.select import ENGINES, GenerationConfig, make_engine
from fastrlhf.generation.sglang import SGLangEngine
from fastrlhf.generation.tensorrt_llm import TensorRTLLMEngine
from fastrlhf.generation.vllm import VLLMEngine
from fastrlhf.models import Decoder, DecoderConfig
from fastrlhf.refit import Poisoned, RefitError, State, contract
from fastrlhf.refit.contract import ContractError
from fastrlhf.refit.layouts import catalogue_for, layout
from fastrlhf.refit.live import catalogue_of, parameters_of
from fastrlhf.refit.refitter import RefitterTarget
from fastrlhf.refit.session import Session
from fastrlhf.refit.shapes import model_of
from fastrlhf.refit.states import PeerLost
from fastrlhf.refit.transports import checkpoint_engine

from ..refit import processes as P
from . import fakes

LIMIT = 60_000  # bytes: a layer of the model does not fit
DRAWN = Sampling(n=1, max_tokens=8)


@pytest.fixture(autouse=True)
def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    shared_memory(monkeypatch)


def shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "reduce_tensor", fakes.reduce_shared)
    monkeypatch.setattr(tensorrt_llm, "reduce_tensor", fakes.reduce_shared)
    monkeypatch.setattr(checkpoint_engine, "reduce_tensor", fakes.reduce_shared)
    monkeypatch.setattr(vllm_worker, "rebuild_cuda_tensor", fakes.rebuild_shared)


def made(name: str, model: Decoder, limit: int = LIMIT, **options: Any) -> tuple[Any, Any]:
    """(the adapter, the fake)."""
    other = Decoder(model.config).initialize(99)
    if name == "vllm":
        fake: Any = fakes.FakeVLLM(other)
        return VLLMEngine(fake, fakes.Parameters, model, limit=limit, **options), fake
    if name == "sglang":
        fake = fakes.FakeSGLang(other, tp=2)
        return SGLangEngine(fake, fakes.flatten, model, tp=2, limit=limit, **options), fake
    fake = fakes.FakeTensorRTLLM(other)
    return TensorRTLLMEngine(fake, fakes.Parameters, model, limit=limit, **options), fake


def same(model: Decoder, fake: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), fake.model.decoder.parameters(), strict=True))


NAMES = ("vllm", "sglang", "tensorrt-llm")


def change(model: Decoder) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)


@pytest.mark.parametrize("limit", [LIMIT, 1 << 20])
@pytest.mark.parametrize("name", NAMES)
def test_refits_and_completions(name: str, limit: int) -> None:
    model = P.decoder(0)
    engine, _fake = made(name, model, limit)
    with pytest.raises(Poisoned):
        engine.generate(P.PROMPTS, DRAWN, seeds=P.SEEDS)
    for version in range(3):
        done = engine.update_weights(None, version)
        assert done.nbytes == sum(p.nbytes for p in model.parameters())
        assert done.copied == done.nbytes * {"vllm": 3, "sglang": 2, "tensorrt-llm": 1}[name]
        own = EmbeddedEngine(model)
        seeds = P.SEEDS
        if name == "sglang":  # its seeds are of each sample
            from fastrlhf.seeds import mix

            seeds = [mix(s, 0) & 0x7FFFFFFF for s in P.SEEDS]
        expected = own.generate(P.PROMPTS, DRAWN, seeds=seeds)
        got = engine.generate(P.PROMPTS, DRAWN, seeds=P.SEEDS)
        assert P.tokens(got) == P.tokens(expected)
        assert got[0][0].logprobs == expected[0][0].logprobs and got[0][0].finish_reason == "length"
        assert {c.weight_spans for g in got for c in g} == {((version, 8),)}
        change(model)


@pytest.mark.parametrize("name", NAMES)
def test_a_failure_on_the_way_poisons_and_the_next_refit_heals(name: str) -> None:
    model = P.decoder(0)
    engine, fake = made(name, model)
    engine.update_weights(None, 0)
    change(model)
    fake.model.fails_at = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(Exception, match="out of memory"):
        engine.update_weights(None, 1)
    assert engine.session.state is State.POISONED
    with pytest.raises(Poisoned, match="refit 2 failed"):
        engine.generate(P.PROMPTS, DRAWN, seeds=P.SEEDS)
    fake.model.fails_at = ""
    change(model)
    engine.update_weights(None, 2)
    assert same(model, fake)


@pytest.mark.parametrize("name", NAMES)
def test_a_failure_as_the_engine_makes_itself_ready_poisons(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker may have changed its layers, another not."""
    model = P.decoder(0)
    engine, fake = made(name, model)
    engine.update_weights(None, 0)
    begin = type(fake.model).begin

    def half(self: fakes.Model) -> None:
        begin(self)
        raise MemoryError("out of memory in the second worker")

    monkeypatch.setattr(type(fake.model), "begin", half)
    with pytest.raises(Exception, match="out of memory"):
        engine.update_weights(None, 1)
    assert engine.session.state is State.POISONED
    with pytest.raises(Poisoned):
        engine.generate(P.PROMPTS, DRAWN, seeds=P.SEEDS)
    monkeypatch.undo()
    shared_memory(monkeypatch)
    assert engine.update_weights(None, 2).version == 2


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_a_cache_that_could_not_be_reset_is_a_failure(name: str) -> None:
    model = P.decoder(0)
    engine, fake = made(name, model)
    engine.update_weights(None, 0)
    fake.running = True
    with pytest.raises(RefitError, match="requests are"):
        engine.update_weights(None, 1)
    assert engine.session.state is State.POISONED
    fake.running = False
    assert engine.update_weights(None, 2).version == 2


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_were_dropped_in_sleep_are_not_served(name: str) -> None:
    engine, _fake = made(name, P.decoder(0))
    engine.update_weights(None, 0)
    engine.sleep(*([2] if name == "vllm" else []))
    engine.wake()
    with pytest.raises(Poisoned, match=r"drop|released"):
        engine.generate(P.PROMPTS, DRAWN, seeds=P.SEEDS)
    engine.update_weights(None, 1)
    assert engine.generate(P.PROMPTS, DRAWN, seeds=P.SEEDS)


def test_vllm_is_sent_plain_values() -> None:
    """vLLM's messages refuse classes: torch's handle of a CUDA tensor has three, and a dtype."""
    buffer = torch.arange(12, dtype=torch.uint8)
    with pytest.raises(TypeError, match="not serializable"):
        fakes.carried(fakes.reduce_shared(buffer)[1])
    sent = fakes.carried({"cpu": vllm.exported(buffer)})
    assert vllm_worker.opened(sent, torch.device("cpu")) is buffer
    with pytest.raises(ValueError, match=r"handles: none for GPU cpu, only for \['other'\]"):
        vllm_worker.opened({"GPU-other": []}, torch.device("cpu"))


def test_an_engine_of_several_workers_is_refused_when_it_is_made() -> None:
    """Only the trainer's own GPU has a handle of the weights."""
    model = P.decoder(0)
    with pytest.raises(ValueError, match=r"tensor_parallel_size: expected 1, .* got 2"):
        VLLMEngine(fakes.FakeVLLM(P.decoder(1), tensor_parallel_size=2), fakes.Parameters, model)
    with pytest.raises(ValueError, match=r"tensor_parallel_size: expected 1, .* got 2"):
        TensorRTLLMEngine(fakes.FakeTensorRTLLM(P.decoder(1), workers=2), fakes.Parameters, model)
    for engine, size in (("vllm", "data_parallel_size"), ("tensorrt-llm", "pipeline_parallel_size"), ("sglang", "dp_size")):
        config = GenerationConfig(engine=engine, options={size: 2})
        with pytest.raises(ConfigError, match=rf"generation.engine: {engine}: {size}: expected 1, .* got 2"):
            make_engine(config, model, None, "")


CALLS = {
    "vllm": (
        "init_weight_transfer_engine",
        "start_weight_update",
        "update_weights",
        "finish_weight_update",
        "reset_prefix_cache",
    ),
    "sglang": ("begin_weight_update", "update_weights_from_tensor", "end_weight_update", "flush_cache"),
    "tensorrt-llm": ("fastrlhf_begin", "fastrlhf_update", "fastrlhf_commit"),
}


@pytest.mark.parametrize(("name", "call"), [(name, call) for name, calls in CALLS.items() for call in calls])
def test_a_call_that_hangs_is_given_up_and_the_engine_poisoned(name: str, call: str) -> None:
    model = P.decoder(0)
    engine, fake = made(name, model, timeout=0.5)
    if call != "init_weight_transfer_engine":  # of the first refit alone
        engine.update_weights(None, 0)
    fake.hangs_at = call
    change(model)
    with pytest.raises(PeerLost, match=r"no answer within 0.5 s"):
        engine.update_weights(None, 1)
    assert engine.session.state is (State.EMPTY if call == "init_weight_transfer_engine" else State.POISONED)
    with pytest.raises(Poisoned):
        engine.generate(P.PROMPTS, DRAWN, seeds=P.SEEDS)
    with pytest.raises(PeerLost, match="has not returned yet"):
        engine.update_weights(None, 2)
    fake.hangs_at = ""
    fake.released.set()
    engine.session.target.calls.phase(10)
    futures.wait([engine.session.target.calls.wait()])
    engine.session.timeout = 60
    change(model)
    assert engine.update_weights(None, 3).version == 3
    assert same(model, fake)


@pytest.mark.parametrize("name", NAMES)
def test_a_refit_waits_for_requests(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-LLM stores the blocks of running requests after the prefix cache was reset; so do these fakes."""
    model = P.decoder(0)
    engine, fake = made(name, model)
    engine.update_weights(None, 0)
    drawn, release = threading.Event(), threading.Event()
    generate = fake.model.engine.generate

    def slow(*args: Any, **kwargs: Any) -> Any:
        out = generate(*args, **kwargs)
        drawn.set()
        release.wait(20)
        return out

    monkeypatch.setattr(fake.model.engine, "generate", slow)
    requests = threading.Thread(target=lambda: engine.generate(P.PROMPTS, DRAWN, seeds=P.SEEDS))
    requests.start()
    drawn.wait(20)
    change(model)
    engine.session.timeout = 0.1
    with pytest.raises(RefitError, match=r"requests are still running after 0.1 s; nothing was written"):
        engine.update_weights(None, 1)
    assert engine.session.state is State.SERVING and engine.version == 0
    engine.session.timeout = 60
    threading.Timer(0.2, release.set).start()
    engine.update_weights(None, 1)
    requests.join()
    other, _ = made(name, model)
    other.update_weights(None, 1)
    got = engine.generate(P.PROMPTS, DRAWN, seeds=P.SEEDS)
    assert got == other.generate(P.PROMPTS, DRAWN, seeds=P.SEEDS)


@pytest.mark.parametrize("name", NAMES)
def test_modes_that_an_engine_does_not_have_are_refused(name: str) -> None:
    for mode in ("abort", "keep"):
        with pytest.raises(ValueError, match=f"mode: expected 'drain', .* got '{mode}'"):
            made(name, P.decoder(0), mode=mode)
        with pytest.raises(ConfigError, match=rf"generation.engine: {name}: mode: expected 'drain', .* got '{mode}'"):
            make_engine(GenerationConfig(engine=name, mode=mode), P.decoder(0), None, "")


@pytest.mark.parametrize("name", NAMES)
def test_weights_can_be_woken_and_replaced_before_the_rest_is_woken(name: str) -> None:
    """vllm#15254: waking took memory for everything at once, beside the trainer's."""
    model = P.decoder(0)
    engine, fake = made(name, model)
    engine.update_weights(None, 0)
    engine.sleep(*([2] if name == "vllm" else []))
    with pytest.raises(RefitError, match=f"refit: {engine.weights_memory} is asleep"):
        engine.update_weights(None, 1)
    fake.room = False
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.wake()
    engine.wake([engine.weights_memory])
    engine.update_weights(None, 1)
    with pytest.raises(RefitError, match="kv_cache asleep: wake it first"):
        engine.generate(P.PROMPTS, DRAWN, seeds=P.SEEDS)
    fake.room = True
    engine.wake(sorted(fake.asleep))
    assert engine.generate(P.PROMPTS, DRAWN, seeds=P.SEEDS) and same(model, fake)


def test_tensorrt_llms_weights_are_not_trusted_after_sleep_and_its_cache_alone_may_sleep() -> None:
    engine, _fake = made("tensorrt-llm", P.decoder(0))
    engine.update_weights(None, 0)
    engine.sleep(["kv_cache"])
    engine.wake(["kv_cache"])
    assert engine.generate(P.PROMPTS, DRAWN, seeds=P.SEEDS)
    with pytest.raises(TypeError, match="restore"):
        engine.sleep(restore="CPU")


def test_sglangs_ranks_each_open_a_handle_of_their_own() -> None:
    """sglang#17870: one that is opened twice hangs in its destructor."""
    model = P.decoder(0)
    engine, _ = made("sglang", model)
    engine.update_weights(None, 0)
    target, serialise, bucket = engine.session.target, engine.session.target.serialise, {}
    target.serialise = lambda tensors: bucket.setdefault(tensors[0][0], serialise(tensors))
    with pytest.raises(RuntimeError, match="a handle was opened twice"):
        engine.update_weights(None, 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_tied_head_is_no_weight_that_was_left_out(name: str) -> None:
    """labs-molt#26: a check for stale weights took it for one."""
    model = Decoder(DecoderConfig.from_hf(P.CONFIG | {"tie_word_embeddings": True})).initialize(0)
    engine, fake = made(name, model)
    for version in range(3):
        engine.update_weights(None, version)
        assert same(model, fake)
        change(model)
    assert fake.model.decoder.lm_head is None


def test_no_socket_outlives_its_refit(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA-NeMo/RL#2513: clients of earlier refits went on."""
    zmq = pytest.importorskip("zmq")
    model, opened = P.decoder(0), []

    class Context(zmq.Context):  # type: ignore[misc,name-defined]
        def socket(self, *args: Any, **kwargs: Any) -> Any:
            opened.append((self, super().socket(*args, **kwargs)))
            return opened[-1][1]

    monkeypatch.setattr(zmq, "Context", Context)
    fake = fakes.FakeSGLang(P.decoder(99))
    engine = SGLangEngine(fake, fakes.flatten, model, limit=LIMIT, wire="checkpoint-engine")
    for version, fails_at in enumerate(("", "model.layers.1.mlp.up_proj.weight", "")):
        fake.model.fails_at = fails_at
        with pytest.raises(RefitError) if fails_at else nullcontext():
            engine.update_weights(None, version)
        assert len(opened) == 2 * (version + 1)  # the sender's and the receiver's
        assert all(context.closed and socket.closed for context, socket in opened)


def test_checkpoint_engines_wire() -> None:
    """Over real sockets, with a name of this process's memory for a handle."""
    pytest.importorskip("zmq")
    model = P.decoder(0)
    fake = fakes.FakeSGLang(P.decoder(99))
    engine = SGLangEngine(fake, fakes.flatten, model, limit=LIMIT, wire="checkpoint-engine")
    for version in range(2):
        engine.update_weights(None, version)
        assert same(model, fake)
        change(model)
    fake.model.fails_at = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(RefitError, match=r"checkpoint-engine worker: model.layers.1.mlp.up_proj.weight: out of memory"):
        engine.update_weights(None, 2)
    assert engine.session.state is State.POISONED
    fake.model.fails_at = ""
    assert engine.update_weights(None, 3).version == 3
    with pytest.raises(ValueError, match="wire: expected one of"):
        SGLangEngine(fake, fakes.flatten, model, tp=2, wire="checkpoint-engine")


def test_the_fakes_refuse_what_the_contracts_do() -> None:
    llm = fakes.FakeVLLM(P.decoder(0))
    with pytest.raises(RuntimeError, match="start_weight_update while new"):
        llm.start_weight_update()
    with pytest.raises(TypeError):
        llm.update_weights()
    with pytest.raises(AttributeError, match="the contract has no load"):
        llm.load()
    sg = fakes.FakeSGLang(P.decoder(0))
    assert sg.end_weight_update() == (False, "end_weight_update out of order")
    with pytest.raises(TypeError):
        sg.begin_weight_update(target="all")
    worker = fakes.FakeTensorRTLLM(P.decoder(0)).worker
    with pytest.raises(RuntimeError, match="before pre_reload"):
        worker.update_weights({})
    with pytest.raises(RuntimeError, match="epoch: 3 is not under way, None is"):
        worker.fastrlhf_update(3, {})
    worker.fastrlhf_begin(4)
    with pytest.raises(RuntimeError, match="expected torch's rebuild_cuda_tensor"):
        worker.fastrlhf_update(4, {"cpu": [("w", (os.system, ("true",)))]})
    with pytest.raises(RuntimeError, match=r"none for GPU cpu, only for \['other'\]"):
        worker.fastrlhf_update(4, {"GPU-other": []})


def test_buckets_keep_modules_whole_where_they_fit() -> None:
    weights = [(f"model.layers.{i}.{n}", torch.zeros(100, dtype=torch.float32)) for i in range(5) for n in "abc"]
    found = list(buckets(weights, 7000))
    assert [n for b in found for n, _ in b.tensors] == [n for n, _ in weights]
    assert 1 < len(found) < 5
    for b in found:
        assert {n.rpartition(".")[0] for n, _ in b.tensors}.isdisjoint(
            n.rpartition(".")[0] for other in found if other is not b for n, _ in other.tensors
        )
    torn = list(buckets(weights, 1000))
    assert [n for b in torn for n, _ in b.tensors] == [n for n, _ in weights]
    assert [len(b.tensors) for b in torn] == [1] * 15
    mixed = [("a", torch.zeros(3, dtype=torch.bfloat16)), ("b", torch.zeros(1)), ("c", torch.zeros(1, dtype=torch.bfloat16))]
    assert [len({t.dtype for _, t in b.tensors}) for b in buckets(mixed, 10_000, one_dtype=True)] == [1, 1, 1]
    assert len(list(buckets(mixed, 10_000))) == 1


def test_a_bucket_is_copied_out_by_the_worker() -> None:
    staging = Staging(4096, torch.device("cpu"))
    tensors = [("a", torch.arange(5.0)), ("b", torch.arange(3, dtype=torch.bfloat16)), ("c", torch.arange(7.0))]
    at = staging.pack(Bucket(tensors))
    assert all(i % 512 == 0 for i in at)
    info = vllm_worker.UpdateInfo(
        1, [n for n, _ in tensors], [str(t.dtype)[6:] for _, t in tensors], [list(t.shape) for _, t in tensors], at
    )
    got = vllm_worker.unpacked(staging.buffer, info)
    staging.buffer.zero_()
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(got, tensors, strict=True))
    with pytest.raises(RefitError, match="b: 4096 bytes do not fit the staging buffer of 4096"):
        staging.pack(Bucket([("a", torch.zeros(1)), ("b", torch.zeros(1024))]))
    with pytest.raises(ValueError, match="offsets: expected 2, one for each name, got 1"):
        vllm_worker.UpdateInfo(1, ["a", "b"], ["float32"] * 2, [[1]] * 2, [0])
    with pytest.raises(ValueError, match="one comes twice"):
        vllm_worker.UpdateInfo(1, ["a", "a"], ["float32"] * 2, [[1]] * 2, [0, 512])
    with pytest.raises(ValueError, match=r"bytes 4094\.\.4098 do not lie"):
        vllm_worker.unpacked(staging.buffer, vllm_worker.UpdateInfo(1, ["a"], ["float32"], [[1]], [4094]))


def test_a_manifest_sees_what_is_missing_twice_or_another() -> None:
    m = Manifest()
    x = torch.zeros(2, 3)
    m.begin()
    m.seen("a", x)
    m.seen("b", x)
    m.complete()
    for names, message in ((["a"], "b: did not come"), (["a", "a"], "a: came twice"), (["c"], "c: was not among the 2")):
        m.begin()
        with pytest.raises(RefitError, match=message):
            for n in names:
                m.seen(n, x)
            m.complete()
    m.begin()
    with pytest.raises(RefitError, match="a: was"):
        m.seen("a", x.bfloat16())


# ----------------------------------------------------------------------------------------------------------------- Refitter


def refitter_pair() -> tuple[Decoder, fakes.FakeRefitter, Any]:
    model = P.decoder(0)
    dest = catalogue_for(model_of(P.CONFIG | {"dtype": "float32"}), layout("tp1", "decoder"))
    shapes = zip(dest.params.names, dest.params.shape.prod(1).tolist(), strict=True)
    return model, fakes.FakeRefitter({n: ("float32", count) for n, count in shapes}), dest


def test_bare_tensorrt_engines() -> None:
    model, refitter, dest = refitter_pair()
    target = RefitterTarget(fakes.FakeTensorRT, refitter, catalogue_of(model), parameters_of(model), dest)
    session = Session(target)
    for version in range(2):
        session.refit(version)
        got = refitter.engine["model.layers.2.self_attn.qkv_proj.weight"]
        assert torch.equal(got, model.layers[2].self_attn.qkv_proj.weight.detach().flatten())
        change(model)
    assert refitter.calls.count("set_named_weights") == len(refitter.prototypes)  # once in all
    refitter.answers = False
    with pytest.raises(RefitError, match="answered false"):
        session.refit(3)
    assert session.state is State.POISONED
    refitter.answers = True
    del refitter.given["model.norm.weight"]
    with pytest.raises(RefitError, match=r"model.norm.weight: the engine waits for it still"):
        session.refit(4)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: setattr(r, "refuses", "model.norm.weight"), "model.norm.weight: the engine refused it"),
        (lambda r: r.prototypes.update(other=("float32", 3)), "other: nobody gives it"),
        (lambda r: r.prototypes.pop("model.norm.weight"), "model.norm.weight: the engine has no such weight"),
        (lambda r: r.prototypes.update({"model.norm.weight": ("float32", 3)}), "the engine's has 3 of float32, given 64"),
        (lambda r: r.prototypes.update({"model.norm.weight": ("float16", 64)}), "the engine's has 64 of float16"),
    ],
)
def test_a_weight_that_tensorrt_does_not_take_is_an_error(edit: Any, message: str) -> None:
    model, refitter, dest = refitter_pair()
    edit(refitter)
    with pytest.raises(RefitError, match=message):
        RefitterTarget(fakes.FakeTensorRT, refitter, catalogue_of(model), parameters_of(model), dest)


# ---------------------------------------------------------------------------------------------------------------- contracts


def test_versions_outside_the_recording_are_refused() -> None:
    assert contract.require_version("vllm", "0.33.0") == "0.33.0"
    assert contract.require_version("vllm", "0.33.1.post1+cu130") and contract.require_version("tensorrt-llm", "1.3.0rc21")
    for engine, version in (("vllm", "0.34.0"), ("vllm", "0.32.9"), ("sglang", "0.5.20"), ("tensorrt-llm", "1.1.0")):
        with pytest.raises(ContractError, match=f"version {version} was not looked at"):
            contract.require_version(engine, version)
        assert contract.require_version(engine, version, any_version=True) == version
    with pytest.raises(ContractError, match="contract: expected one of"):
        contract.load("other")


def test_a_contract_is_compared_with_files(tmp_path: Path) -> None:
    c = contract.load("checkpoint-engine")
    (file,) = c.signatures
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text("""
class FlattenedTensorMetadata:
    name: str
    shape: int
    dtype: int
    offset: int
def _rebuild_ipc(handle, device_id=None): ...
def _extract_weights(payload, buffer): ...
def update_weights_from_ipc(zmq_ctx, zmq_handle, device_id, *, run, post_hook=None): ...
""")
    assert contract.check("checkpoint-engine", tmp_path) == []
    path.write_text(
        path.read_text()
        .replace("run, post_hook=None", "run")
        .replace("    offset: int\n", "")
        .replace("_rebuild_ipc", "_rebuilt")
    )
    found = contract.check("checkpoint-engine", tmp_path)
    assert len(found) == 3
    assert (
        "expected (zmq_ctx, zmq_handle, device_id, *, run, post_hook=), found (zmq_ctx, zmq_handle, device_id, *, run)"
        in "".join(found)
    )
    assert "FlattenedTensorMetadata: without offset" in "".join(found) and "_rebuild_ipc: there is no such function" in "".join(
        found
    )
    path.unlink()
    assert contract.check("checkpoint-engine", tmp_path) == [f"{file}: there is no such file"]


FILES = dict(p.split("=", 1) for p in os.environ.get("FASTRLHF_ENGINE_FILES", "").split(",") if p)


@pytest.mark.parametrize("engine", ["vllm", "sglang", "checkpoint-engine"])
def test_the_recorded_contract_is_the_engines(engine: str) -> None:
    root = FILES.get(engine)
    if root is None:
        found = importlib.util.find_spec(engine.replace("-", "_"))
        if found is None or found.origin is None:
            pytest.skip(f"{engine} is not here, neither installed nor in FASTRLHF_ENGINE_FILES")
        root = str(Path(found.origin).parent.parent)
    assert contract.check(engine, Path(root)) == []


def test_every_engine_has_its_class() -> None:
    assert set(ENGINES) == {"embedded", "embedded-process", *NAMES}
    assert foreign.WholeTensors.atomic is False
    with pytest.raises(ValueError, match=r"generation\.engine: expected one of"):
        make_engine(GenerationConfig(engine="other"), P.decoder(0), None, "")
