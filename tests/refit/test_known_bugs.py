"""What others shipped: each case runs twice, as it is and with the fix taken out, and must fail then, and so as it is said. Where
one comes from is said as owner/repository#issue; the rest of the list is in test_plan, test_processes, test_cuda_ipc (handles),
test_moved (parameters that moved, and those that did not) and tests/generation/test_foreign."""

from __future__ import annotations

import threading
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fastrlhf.generation import foreign, vllm, vllm_worker
from fastrlhf.generation.foreign import Bucket, Staging
from fastrlhf.generation.vllm import VLLMEngine, VLLMTarget
from fastrlhf.refit import PlanError, Poisoned, RefitError, Session, Weights, states
from fastrlhf.refit import catalogue as catalogues
from fastrlhf.refit import plan as plans
from fastrlhf.refit.host import Host
from fastrlhf.refit.layouts import Layout, _Writer, catalogue_for, layout
from fastrlhf.refit.memory import Bound
from fastrlhf.refit.plan import make_plan
from fastrlhf.refit.quantise import quantise_blocks, quantise_fused
from fastrlhf.refit.shapes import Model, model_of
from fastrlhf.refit.states import State
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..generation import fakes
from . import processes as P
from . import test_host
from .oracle import Split, config, execute, whole

Patch = Callable[[pytest.MonkeyPatch], None]


def only_with_the_fix(scenario: Callable[[], None], without: Patch, error: type[BaseException], match: str) -> None:
    scenario()
    with pytest.MonkeyPatch.context() as patch:
        without(patch)
        with pytest.raises(error, match=match):
            scenario()
    scenario()


Unnoticed = pytest.fail.Exception  # what the scenario waits for was not raised


def exact(c: dict[str, Any], a: Layout, b: Layout) -> None:
    model = model_of(c)
    plan = make_plan(catalogue_for(model, a), catalogue_for(model, b))
    tensors = whole(plan.source)
    got, expected = execute(plan, Split(c, a, tensors).out), Split(c, b, tensors).out
    for key, t in expected.items():
        assert torch.equal(got[key], t.reshape(got[key].shape)), key


# ------------------------------------------------------------------------------------------------------------------ layout


def test_a_tensor_parallel_slice_through_a_key_value_group() -> None:
    """modelexpress#650: fewer key-value heads than tensor-parallel ranks."""

    def by_heads(patch: pytest.MonkeyPatch) -> None:  # heads are shared out as if groups were whole on a rank
        attention = _Writer._attention

        def plain(self: Any, module: Any, stage: int) -> None:
            kept, self.layout = self.layout, replace(self.layout, interleaved=False)
            attention(self, module, stage)
            self.layout = kept

        patch.setattr(_Writer, "_attention", plain)

    only_with_the_fix(
        lambda: exact(config(num_key_value_heads=2, head_dim=4), layout("tp4", "megatron"), layout("tp4", "engine")), by_heads,
        PlanError, r"qkv_proj.weight: expected \(16, 8\) elements",
    )  # fmt: skip


def test_gate_and_up_are_interleaved_by_rank() -> None:
    """[gate; up] of a rank is no slice of the whole [gate; up]."""

    def sliced(patch: pytest.MonkeyPatch) -> None:
        def row_sharded(self: Any, module: Any, stage: int) -> None:
            for rank, t in self._ranks(stage):
                total = sum(p.rows for p in module.parts)
                low, high = t * total // self.layout.tp, (t + 1) * total // self.layout.tp
                at, shares = 0, []
                for p in module.parts:
                    a, b = max(low, at), min(high, at + p.rows)
                    if a < b:
                        shares.append((p, a - at, b - at))
                    at += p.rows
                self._stacked(rank, module.name, shares)

        patch.setattr(_Writer, "_row_sharded", row_sharded)

    only_with_the_fix(
        lambda: exact(config(), layout("tp2", "megatron"), layout("tp4", "engine")),
        sliced,
        AssertionError,
        "gate_up_proj.weight",
    )


def test_a_padded_vocabulary() -> None:
    """vllm-project/vllm#12170, #12230, #13175: rows past the vocabulary are zeros in the engine, and no tensor's."""

    def scenario() -> None:
        exact(config(vocab_size=301), layout("tp2", "megatron"), layout("tp4", "engine"))

    def unpadded(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(catalogues.Builder, "pad", lambda *a: None)

    only_with_the_fix(scenario, unpadded, PlanError, r"rows 61\.\.80, columns 0\.\.8 would be written never")


def test_a_tied_head_that_the_engine_holds_apart() -> None:
    """vllm#51665, #6758, sglang#2009, prime-rl#2823: the head of a tied model went stale."""
    c = config(tie_word_embeddings=True)
    dest = replace(layout("tp2", "engine"), untie=True)

    def scenario() -> None:
        model = model_of(c)
        plan = make_plan(catalogue_for(model, layout("tp1", "megatron")), catalogue_for(model, dest))
        written = {plan.dest.params.names[i] for i in plan.column("dest")}
        assert "lm_head.weight" in written

    def forgotten(patch: pytest.MonkeyPatch) -> None:  # the head is a parameter to which nothing comes
        vocab = _Writer._vocab

        def named(self: Any, part: Any, name: str, stage: int) -> None:
            if name != "lm_head.weight":
                return vocab(self, part, name, stage)
            for rank, _ in self._ranks(stage):
                self.builder.param(rank, name, 160, part.cols, "float32")
            return None

        patch.setattr(_Writer, "_vocab", named)

    only_with_the_fix(scenario, forgotten, PlanError, r"lm_head.weight of rank 0 .* would be written never")


def test_what_nobody_writes_is_found_before_anything_is_copied() -> None:
    """nemo_export's assert on a tuple, pytorch/TensorRT#4198: missing weights were warned of, or not at all."""

    def scenario() -> None:
        source, dest = catalogues.Builder(1), catalogues.Builder(1)
        for b, rows in ((source, 4), (dest, 3)):
            b.put(b.tensor("w", 4, 4, "float32"), 0, 0, rows, 4, b.param(0, "w", 4, 4, "float32"))
        with pytest.raises(PlanError, match=r"rows 3..4, columns 0..4 would be written never"):
            make_plan(source.build(), dest.build(), ignore=frozenset({"w"}))

    def unproven(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(plans, "_prove_written_once", lambda *a: None)

    only_with_the_fix(scenario, unproven, Unnoticed, "DID NOT RAISE PlanError")


def test_experts_that_do_not_go_anywhere() -> None:
    """NeMo-RL's NIXL path dropped experts."""
    c = config(model_type="mixtral", num_local_experts=4, intermediate_size=24)
    fewer = config(model_type="mixtral", num_local_experts=3, intermediate_size=24)

    def scenario() -> None:
        a = catalogue_for(model_of(c), layout("tp1", "megatron"))
        dest = catalogue_for(model_of(fewer), layout("tp1", "engine"))
        gate = dest.tensors.names.index("model.layers.0.block_sparse_moe.gate.weight")
        assert gate >= 0
        with pytest.raises(PlanError, match=r"experts\.3\.w.\.weight: the source has it and it goes nowhere"):
            plans._match(a.tensors, dest.tensors, frozenset())

    def unseen(patch: pytest.MonkeyPatch) -> None:
        match = plans._match
        patch.setattr(plans, "_match", lambda s, d, ignore: match(s, d, frozenset(s.names)))

    only_with_the_fix(scenario, unseen, AssertionError, r"gate.weight: shape \(4, 8\) in the source")


@pytest.mark.parametrize("tp", [2, 4])
def test_a_quantisation_block_that_a_shard_cuts(tp: int) -> None:
    """vllm#42803, #46755, #45200, #36242: block scales that straddle ranks or fused parts."""
    block = (16, 16)
    c = config(hidden_size=64, num_attention_heads=8, num_key_value_heads=4, head_dim=16, intermediate_size=96, num_hidden_layers=1,
               vocab_size=320)  # fmt: skip

    def quantised(rows: int, kind: str) -> Any:
        model: Model = model_of({**c, "intermediate_size": rows})
        return catalogue_for(model, replace(layout(f"tp{tp}", kind), quantise=block))

    fits, cuts = 16 * 4 * tp, 16 * 3 * tp // 2
    make_plan(quantised(fits, "decoder"), quantised(fits, "engine"))
    if cuts % (16 * tp):
        with pytest.raises(PlanError, match="cuts a quantisation block of 16 x 16; quantise before the split"):
            quantised(cuts, "engine")
    weight = torch.randn(fits, 64)
    whole_q = quantise_blocks(weight, block)
    apart = [quantise_blocks(w, block) for w in weight.chunk(tp)]
    assert torch.equal(torch.cat([q.data.view(torch.uint8) for q in apart]), whole_q.data.view(torch.uint8))
    assert torch.equal(torch.cat([q.scale_inv for q in apart]), whole_q.scale_inv)
    odd = torch.randn(16 * 3, 64)
    straddling = [quantise_blocks(w, block) for w in odd.chunk(2)]  # 24 rows each
    assert not torch.equal(
        torch.cat([q.data.view(torch.uint8) for q in straddling]), quantise_blocks(odd, block).data.view(torch.uint8)
    )
    back = whole_q.data.float() * whole_q.scale_inv.repeat_interleave(16, 0).repeat_interleave(16, 1)
    assert (back - weight).abs().max() < weight.abs().max() * 2**-4


def test_the_planner_itself_refuses_a_cut_block() -> None:
    def scenario() -> None:
        source, dest = catalogues.Builder(1), catalogues.Builder(2)
        t = source.tensor("w", 48, 16, "float8_e4m3fn", (16, 16))
        source.put(t, 0, 0, 48, 16, source.param(0, "w", 48, 16, "float8_e4m3fn"))
        for rank in range(2):
            t = dest.tensor("w", 48, 16, "float8_e4m3fn", (16, 16))
            dest.put(t, 24 * rank, 0, 24, 16, dest.param(rank, "w", 24, 16, "float8_e4m3fn"))
        with pytest.raises(PlanError, match="cuts a quantisation block"):
            make_plan(source.build(), dest.build())

    def blind(patch: pytest.MonkeyPatch) -> None:
        check = plans._check_side
        patch.setattr(
            plans, "_check_side",
            lambda n, s: check(n, replace(s, tensors=replace(s.tensors, block=np.ones_like(s.tensors.block)))),
        )  # fmt: skip

    only_with_the_fix(scenario, blind, Unnoticed, "DID NOT RAISE PlanError")


def test_fused_projections_share_one_scale() -> None:
    """vllm#2379: a scale a tensor over fused q, k and v is of the largest of them."""
    q, k, v = torch.randn(8, 4), torch.randn(4, 4) * 10, torch.randn(4, 4) * 0.1
    parts, scale = quantise_fused([q, k, v])
    for part, weight in zip(parts, (q, k, v), strict=True):
        assert (part.float() * scale - weight).abs().max() <= k.abs().max() * 2**-4
    assert torch.isclose(scale, k.abs().max() / 448)


# -------------------------------------------------------------------------------------------------------------- stale weights


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "reduce_tensor", fakes.reduce_shared)
    monkeypatch.setattr(vllm_worker, "rebuild_cuda_tensor", fakes.rebuild_shared)


LLMS: list[Any] = []  # the last that was made


def refitted() -> tuple[Any, Any, Any]:
    model = P.decoder(0)
    fake = fakes.FakeVLLM(P.decoder(9))
    LLMS[:] = [fake]
    engine = VLLMEngine(fake, fakes.Parameters, model, limit=60_000)
    engine.update_weights(None, 0)
    return model, fake, engine


def same(model: Any, fake: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), fake.model.decoder.parameters(), strict=True))


@pytest.mark.usefixtures("shared")
def test_completions_of_older_weights_in_the_prefix_cache() -> None:
    """vllm#9744, #46125, NVIDIA-NeMo/RL#4018 (17 steps), lmdeploy#4917: nothing reset the cache."""

    def scenario() -> None:
        model, _fake, engine = refitted()
        before = engine.generate(P.PROMPTS, P.SAMPLING, seeds=P.SEEDS)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(-1.3)
        engine.update_weights(None, 1)
        assert P.tokens(engine.generate(P.PROMPTS, P.SAMPLING, seeds=P.SEEDS)) != P.tokens(before)

    def never(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(
            VLLMTarget, "commit", lambda self, epoch, version: LLMS[0].finish_weight_update(weight_version=str(version))
        )

    only_with_the_fix(scenario, never, AssertionError, r"^assert \[\[\[")


@pytest.mark.usefixtures("shared")
def test_a_buffer_that_is_written_again_while_the_engine_still_reads_it() -> None:
    """modelscope/ms-swift#10204, vLLM's own note on packed buffers: a module torn over buckets, or padded, reads other bytes."""

    def scenario() -> None:
        model, fake, _ = refitted()
        assert same(model, fake)

    def views(patch: pytest.MonkeyPatch) -> None:
        copies = vllm_worker.unpacked

        def lying(buffer: torch.Tensor, info: Any) -> list[tuple[str, torch.Tensor]]:
            return [
                (name, buffer[at : at + t.nbytes].view(t.dtype).view(t.shape))
                for (name, t), at in zip(copies(buffer, info), info.offsets, strict=True)
            ]

        patch.setattr(vllm_worker, "unpacked", lying)

    only_with_the_fix(scenario, views, AssertionError, "False = same")


@pytest.mark.usefixtures("shared")
def test_weights_that_are_left_unprocessed() -> None:
    """NVIDIA-NeMo/RL#4122, sglang#17114: the finishing hook was not run, or its error swallowed."""

    def scenario() -> None:
        _model, fake, _engine = refitted()
        assert fake.calls.count("finish_weight_update") == 1 and fake.state == "idle" and fake.version == "0"

    def unfinished(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(VLLMTarget, "commit", lambda self, epoch, version: None)

    only_with_the_fix(scenario, unfinished, AssertionError, r"assert \(0 == 1")


@pytest.mark.usefixtures("shared")
def test_parameters_that_moved_are_seen() -> None:
    """vllm#48941, #48312, #54477: a captured graph went on with the old storage."""

    def scenario() -> None:
        _model, fake, engine = refitted()
        linear = fake.model.decoder.layers[0].mlp.down_proj
        reload, kept = fakes.Layerwise.finish, []

        def moving(self: Any) -> None:
            reload(self)
            kept.append(linear.weight)
            linear.weight = torch.nn.Parameter(linear.weight.detach().clone())

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fakes.Layerwise, "finish", moving)
            with pytest.raises(RuntimeError, match=r"layers.0.mlp.down_proj.weight: lies elsewhere after the update"):
                engine.update_weights(None, 1)
        assert engine.session.state is State.POISONED

    def unregistered(patch: pytest.MonkeyPatch) -> None:
        made = vllm_worker.make_engine

        def without(base: Any, reload: Any) -> Any:
            cls = made(base, reload)
            cls.finish_weight_update = lambda self: reload.finalize_layerwise_reload(self.model, self.model_config)
            return cls

        patch.setattr(fakes, "make_engine", without)

    only_with_the_fix(scenario, unregistered, Unnoticed, "DID NOT RAISE RuntimeError")


@pytest.mark.usefixtures("shared")
def test_sleep_that_drops_weights() -> None:
    """huggingface/trl#4571, vllm#29341."""

    def scenario() -> None:
        _, _, engine = refitted()
        engine.sleep(2)
        engine.wake()
        with pytest.raises(Poisoned, match="slept at level 2"):
            engine.generate(P.PROMPTS, P.SAMPLING, seeds=P.SEEDS)

    def forgotten(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(Session, "spoil", lambda *a: None)

    only_with_the_fix(scenario, forgotten, ValueError, "logits: row 0 has no largest finite logit")


@pytest.mark.usefixtures("shared")
def test_an_abort_that_leaves_a_mixture() -> None:
    """TensorRT-LLM#16642, and every engine there is: what was written stays, so it must not be served."""

    def scenario() -> None:
        _model, fake, engine = refitted()
        fake.model.fails_at = "model.norm.weight"
        with pytest.raises(RuntimeError):
            engine.update_weights(None, 1)
        with pytest.raises(Poisoned):
            engine.generate(P.PROMPTS, P.SAMPLING, seeds=P.SEEDS)

    def trusted(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(foreign.WholeTensors, "atomic", True)

    only_with_the_fix(scenario, trusted, Unnoticed, "DID NOT RAISE Poisoned")


# --------------------------------------------------------------------------------------------------------------------- races


def test_a_late_acknowledgement_is_of_its_own_attempt() -> None:
    """An answer of a dead attempt was taken for the next one's."""

    def scenario() -> None:
        w = Weights(1, version=0)
        w.begin(1, 1, "drain", 1)
        w.fail(1, "timed out")
        w.begin(2, 2, "drain", 1)
        with pytest.raises(states.StaleEpoch):
            w.commit(1)
        assert w.state is State.REFITTING

    def unchecked(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(Weights, "_check", lambda self, epoch: None)

    only_with_the_fix(scenario, unchecked, Unnoticed, "DID NOT RAISE StaleEpoch")


def test_nothing_is_committed_before_every_rank_has_written() -> None:
    """modelscope/ms-swift#10204: one rank's answer came before the others' barrier."""

    def scenario() -> None:
        engine = test_host.Engine(2)
        leader = engine.trainer(1.0, 0, 2)
        leader.begin(1, 1, "drain", 0.2)
        leader.transfer(1)
        with pytest.raises(RefitError, match=r"rank\(s\) \[1\] have not written"):
            leader.commit(1, 1)
        assert engine.weights.state is State.POISONED
        leader.close()

    def any_rank(patch: pytest.MonkeyPatch) -> None:
        count = Host._count

        def counts_all(self: Host, attempt: Any, rank: int) -> None:
            for r in range(attempt.plan.source.ranks):
                count(self, attempt, r)

        patch.setattr(Host, "_count", counts_all)

    only_with_the_fix(scenario, any_rank, Unnoticed, "DID NOT RAISE RefitError")


@pytest.mark.parametrize("slots", [1, 2])
def test_a_read_that_a_refit_tears(slots: int) -> None:
    """A flip without leases: 5 of 18,449 reads torn, or 8,525 of 13,943 where refits follow each other."""

    def scenario() -> None:
        w = Weights(slots, version=0)
        memory = np.zeros((2, 64), np.int64)
        torn, ended = 0, threading.Event()

        def write() -> None:
            epoch = 0
            while not ended.is_set():
                epoch += 1
                slot = w.begin(epoch, epoch, "drain", 5)
                for i in range(64):
                    memory[slot, i] = epoch
                    if i == 32:
                        time.sleep(0.0002)
                w.commit(epoch)

        writer = threading.Thread(target=write)
        writer.start()
        end = time.monotonic() + 0.3
        try:
            while time.monotonic() < end:
                lease = w.acquire(5)
                first = memory[lease.slot, :20].copy()
                time.sleep(0.0005)
                rest = memory[lease.slot, 20:].copy()
                torn += len({*first.tolist(), *rest.tolist(), lease.version}) > 1
                w.release(lease)
        finally:
            ended.set()
            writer.join()
        assert torn == 0

    def no_lease(patch: pytest.MonkeyPatch) -> None:
        take = Weights._take

        def unheld(self: Weights) -> Any:
            lease = take(self)
            self._leases[self.active] -= 1
            return lease

        patch.setattr(Weights, "_take", unheld)
        patch.setattr(Weights, "_give", lambda self, lease: None)

    only_with_the_fix(scenario, no_lease, AssertionError, r"^assert \d+ == 0")


def test_memory_that_the_trainer_took_elsewhere() -> None:
    """miles#1923: handles of buffers that had been replaced."""
    from fastrlhf.generation import EmbeddedProcessEngine
    from fastrlhf.refit.transports.posix_shm import PosixShm

    model = P.decoder(0)
    with EmbeddedProcessEngine(model) as engine:
        engine.update_weights(None, 0)

        def scenario() -> None:
            for p in model.parameters():
                p.data = p.data.clone() * 1.1  # as a flat buffer made anew would
            engine.update_weights(None, engine.version + 1)
            assert engine.session is not None and isinstance(engine.session.target, PosixShm)
            from fastrlhf import _cpu

            named = dict(model.named_parameters())
            for name, value in engine.session.target.checksums()[0].items():
                assert value == _cpu.xxh3(named[name].data_ptr(), named[name].nbytes), name

        def where_it_lay(patch: pytest.MonkeyPatch) -> None:
            patch.setattr(Bound, "refresh", lambda self: None)

        only_with_the_fix(scenario, where_it_lay, AssertionError, "embed_tokens.weight")
        # modelscope/ms-swift#10207: what the engine has is no alias of the trainer's memory
        before = engine.generate(P.PROMPTS, P.SAMPLING, seeds=P.SEEDS)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        assert engine.generate(P.PROMPTS, P.SAMPLING, seeds=P.SEEDS) == before


# -------------------------------------------------------------------------------------------------------------------- memory


class Allocations(TorchDispatchMode):
    """Counts the bytes of what this thread's torch operations make anew; tracemalloc sees numpy's, and not these."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.nbytes += t.untyped_storage().nbytes()
        return out


def test_a_refit_gathers_nothing() -> None:
    """NVIDIA-NeMo/RL#70: whole tensors were gathered, and memory ran out. Here a refit allocates nothing on the trainer's side."""
    from fastrlhf.generation import EmbeddedProcessEngine
    from fastrlhf.refit.transports.posix_shm import PosixShm

    with EmbeddedProcessEngine(P.decoder(0)) as engine:
        engine.update_weights(None, 0)

        def scenario() -> None:
            tracemalloc.start()
            with Allocations() as made:
                engine.update_weights(None, engine.version + 1)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert made.nbytes == 0
            assert peak < 16 << 10  # messages

        def gathering(patch: pytest.MonkeyPatch) -> None:
            transfer = PosixShm.transfer

            def gathers(self: PosixShm, epoch: int) -> Any:
                torch.cat([t.detach().flatten() for t in self._bound.tensors.values()])
                return transfer(self, epoch)

            patch.setattr(PosixShm, "transfer", gathers)

        only_with_the_fix(scenario, gathering, AssertionError, r"^assert \d+ == 0")


def test_offsets_that_a_dtype_does_not_divide() -> None:
    """vLLM's packing raises on mixed dtypes, SGLang's promoted them: tensors begin at multiples of 512 bytes here."""

    def scenario() -> None:
        staging = Staging(8192, torch.device("cpu"))
        tensors = [("a", torch.ones(3, dtype=torch.uint8)), ("b", torch.ones(3)), ("c", torch.ones(5, dtype=torch.bfloat16))]
        at = staging.pack(Bucket(tensors))
        assert all(i % t.dtype.itemsize == 0 for i, (_, t) in zip(at, tensors, strict=True))

    def back_to_back(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(foreign, "ALIGN", 1)

    only_with_the_fix(scenario, back_to_back, RuntimeError, "must be divisible by 4")
