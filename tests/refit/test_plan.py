"""Plans against a full gather and re-split, to the bit; what cannot be planned is refused by name; plans are quick."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fastrlhf.refit.catalogue import Builder, Catalogue, PlanError, from_message, to_message
from fastrlhf.refit.layouts import Layout, catalogue_for, layout
from fastrlhf.refit.plan import Plan, make_plan
from fastrlhf.refit.shapes import model_of

from .oracle import Split, config, execute, whole


def planned(c: dict[str, Any], a: Layout, b: Layout) -> Plan:
    model = model_of(c)
    return make_plan(catalogue_for(model, a), catalogue_for(model, b))


def exact(c: dict[str, Any], a: Layout, b: Layout) -> Plan:
    plan = planned(c, a, b)
    tensors = whole(plan.source)
    got, expected = execute(plan, Split(c, a, tensors).out), Split(c, b, tensors).out
    assert got.keys() == expected.keys()
    for key, t in expected.items():
        assert torch.equal(got[key], t.reshape(got[key].shape)), key
    return plan


def divides(c: dict[str, Any], a: Layout) -> bool:
    heads, groups, dim = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    if c["intermediate_size"] % a.tp or heads * dim % a.tp:
        return False
    if a.interleaved:
        return (heads + 2 * groups) * dim % a.tp == 0
    return heads % a.tp == 0 and (groups % a.tp == 0 or a.tp % groups == 0)


@pytest.mark.parametrize("groups", range(1, 9))
def test_every_tp_to_every_tp_is_a_gather_and_a_split(groups: int) -> None:
    done = 0
    for tp in range(1, 9):
        for to in range(1, 9):
            pp = 1 + (tp + to + groups) % 4
            c = config(
                num_key_value_heads=groups, num_attention_heads=math.lcm(groups, tp, to), head_dim=2 * tp, num_hidden_layers=pp,
                tie_word_embeddings=bool((tp + to) % 2), model_type="qwen2" if to % 2 else "llama", vocab_size=301 + tp,
            )  # fmt: skip
            a, b = replace(layout(f"tp{tp}pp{pp}", "megatron"), dp=1 + tp % 2), layout(f"tp{to}", "engine")
            if divides(c, a) and divides(c, b):
                exact(c, a, b)
                exact(c, b, a)
                done += 1
            else:
                with pytest.raises(PlanError, match=r"shared evenly|neither divides"):
                    planned(c, a, b)
    assert done >= 16


@pytest.mark.parametrize("pp", [1, 2, 3, 4])
def test_pipelines_and_whole_tensors(pp: int) -> None:
    c = config(num_hidden_layers=7)
    exact(c, layout(f"tp2pp{pp}", "megatron"), layout("tp1", "hf"))
    exact(c, layout("tp1", "hf"), layout(f"tp1pp{pp}", "decoder"))
    exact(c, replace(layout(f"tp2pp{pp}", "megatron"), stages=(7 - pp + 1, *[1] * (pp - 1))), layout("tp4pp2", "engine"))
    exact(config(num_hidden_layers=4 * pp), replace(layout(f"tp2pp{pp}", "megatron"), virtual=2), layout("tp2", "engine"))


@pytest.mark.parametrize(
    ("ep", "etp", "to_ep", "to_etp"), [(4, 1, 1, 1), (2, 2, 4, 1), (1, 4, 2, 2), (4, 1, 2, 1), (1, 1, 1, 4)]
)
def test_experts(ep: int, etp: int, to_ep: int, to_etp: int) -> None:
    c = config(model_type="mixtral", num_local_experts=8, intermediate_size=24)
    a = replace(layout("tp2pp2dp2", "megatron"), ep=ep, etp=etp)
    exact(c, a, replace(layout("tp4", "engine"), ep=to_ep, etp=to_etp))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pp", [1, 3])
def test_tied_and_untied_heads(tied: bool, pp: int) -> None:
    c = config(tie_word_embeddings=tied)
    a = layout(f"tp2pp{pp}", "megatron")
    exact(c, a, layout("tp4", "engine"))
    if tied:  # an engine that holds the head as a parameter of its own gets it from the embedding
        plan = exact(c, a, replace(layout("tp4", "engine"), untie=True))
        assert "lm_head.weight" in plan.dest.params.names
        assert "lm_head.weight" not in plan.dest.tensors.names


def test_shards_of_rows_are_a_source_like_another() -> None:
    c = config()
    model = model_of(c)
    source, dest = catalogue_for(model, layout("tp2", "megatron")), catalogue_for(model, layout("tp4", "engine"))
    plan = make_plan(source.rows_sharded(3), dest)
    tensors = whole(source)
    held = {}
    for (rank, name), t in Split(c, layout("tp2", "megatron"), tensors).out.items():
        share = -(-t.shape[0] // 3)
        for i in range(3):
            held[rank * 3 + i, name] = t[min(i * share, t.shape[0]) : (i + 1) * share]
    got = execute(plan, held)
    for key, t in Split(c, layout("tp4", "engine"), tensors).out.items():
        assert torch.equal(got[key], t.reshape(got[key].shape)), key


def test_replicas_share_the_load_and_the_nearest_is_taken() -> None:
    c = config(num_hidden_layers=24, hidden_size=64)
    plan = exact(c, layout("tp2dp4", "megatron"), layout("tp2", "engine"))
    load = np.bincount(plan.source_rank, plan.nbytes, minlength=8)
    assert load.max() / load.mean() < 1.1
    model = model_of(c)
    source = catalogue_for(model, layout("tp2dp4", "megatron")).at([(i // 4, i % 4) for i in range(8)])
    here = catalogue_for(model, layout("tp1", "engine")).at([(1, 1)])
    near = make_plan(source, here)
    assert set(near.source_rank.tolist()) <= {4, 5, 6, 7}  # its node
    replicated = np.isin(near.source.column("rows")[0], 8)
    norms = [i for i, n in enumerate(near.column("source")) if "norm" in near.source.params.names[n]]
    assert {int(near.source_rank[i]) for i in norms} == {5} and not replicated.all()  # its device


def test_the_digest_is_of_everything_that_must_agree() -> None:
    c = config(num_key_value_heads=4)
    a, b = layout("tp2", "megatron"), layout("tp4", "engine")
    same = planned(c, a, b).digest
    assert planned(c, a, b).digest == same and len(same) == 64
    other = [
        planned({**c, "vocab_size": 302}, a, b), planned({**c, "torch_dtype": "bfloat16"}, a, b),
        planned(c, replace(a, interleaved=False), b), planned(c, layout("tp1", "megatron"), b), planned(c, a, layout("tp2", "engine")),
    ]  # fmt: skip
    assert len({same, *(p.digest for p in other)}) == 6


def test_a_catalogue_survives_its_message() -> None:
    c = config(model_type="mixtral", num_local_experts=4)
    a = catalogue_for(model_of(c), layout("tp2ep2", "megatron"))
    again = from_message(to_message(a))
    b = catalogue_for(model_of(c), layout("tp2", "engine"))
    assert make_plan(a, b).digest == make_plan(again, b).digest


def pair(**edit: Any) -> tuple[Catalogue, Catalogue]:
    """One tensor (8, 4) on two ranks, to one."""
    source, dest = Builder(2), Builder(1)
    for rank in range(2):
        t = source.tensor("w", 8, 4, "float32")
        source.put(t, 4 * rank, 0, 4, 4, source.param(rank, "w", 4, 4, "float32"))
    t = dest.tensor(edit.get("name", "w"), edit.get("rows", 8), 4, edit.get("dtype", "float32"))
    p = dest.param(0, "w", edit.get("rows", 8), 4, edit.get("held", edit.get("dtype", "float32")))
    for row, rows, at in edit.get("regions", [(0, edit.get("rows", 8), 0)]):
        dest.put(t, row, 0, rows, 4, p, at)
    if "pad" in edit:
        dest.pad(p, *edit["pad"])
    return source.build(), dest.build()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"name": "v"}, "v: the destination needs it and the source has no such tensor"),
        ({"rows": 16}, r"w: shape \(8, 4\) in the source, \(16, 4\) in the destination"),
        ({"dtype": "bfloat16"}, "w: float32 in the source, bfloat16 in the destination"),
        ({"held": "bfloat16"}, "the parameter has another dtype"),
        ({"regions": [(0, 6, 0)]}, "w of rank 0 of the destination: rows 6..8, columns 0..4 would be written never"),
        ({"regions": [(0, 6, 0), (4, 4, 4)]}, "rows 4..6, columns 0..4 would be written 2 times"),
        ({"regions": [(0, 4, 0), (0, 4, 4)]}, "w: rows 4..8, columns 0..4 go nowhere"),
        ({"pad": (0, 0, 1, 1)}, "rows 0..1, columns 0..1 would be written 2 times"),
        ({"regions": [(4, 8, 0)]}, "outside the tensor"),
        ({"regions": [(0, 8, 4)]}, "outside the parameter"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(edit: dict[str, Any], message: str) -> None:
    source, dest = pair(**edit)
    with pytest.raises(PlanError, match=message):
        make_plan(source, dest)


def test_what_goes_nowhere_is_refused_or_named_to_be_ignored() -> None:
    source, dest = pair()
    extra = Builder(1)
    extra.put(extra.tensor("value_head", 1, 4, "float32"), 0, 0, 1, 4, extra.param(0, "v", 1, 4, "float32"))
    from fastrlhf.refit.catalogue import merged

    both = merged([source, extra.build()])
    with pytest.raises(PlanError, match="value_head: the source has it and it goes nowhere"):
        make_plan(both, dest)
    assert len(make_plan(both, dest, ignore=frozenset({"value_head"})).ops) == 2


def test_sources_that_overlap_in_part_are_cut() -> None:
    source, dest = Builder(3), Builder(1)
    t = source.tensor("w", 8, 4, "float32")
    values = torch.arange(32.0).view(8, 4)
    held = {}
    for rank, (row, rows) in enumerate([(0, 5), (3, 5), (0, 8)]):
        source.put(t, row, 0, rows, 4, source.param(rank, "w", rows, 4, "float32"))
        held[rank, "w"] = values[row : row + rows].clone()
    dest.put(dest.tensor("w", 8, 4, "float32"), 0, 0, 8, 4, dest.param(0, "w", 8, 4, "float32"))
    plan = make_plan(source.build(), dest.build())
    assert torch.equal(execute(plan, held)[0, "w"], values)


LARGE = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
         "num_attention_heads": 64, "num_key_value_heads": 8}  # fmt: skip
EXPERTS = {
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128, "n_routed_experts": 256,
    "n_shared_experts": 1, "first_k_dense_replace": 3, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128, "v_head_dim": 128,
}  # fmt: skip


@pytest.mark.parametrize(
    ("c", "a", "b", "parameters", "seconds"),
    [(LARGE, "tp8pp4", "tp4", 70.55e9, 0.1), (EXPERTS, "tp1pp16dp64ep64", "tp8dp4ep32", 671.0e9, 2.0)],
)
def test_plans_of_large_models_are_quick(c: dict[str, Any], a: str, b: str, parameters: float, seconds: float) -> None:
    best = float("inf")
    for _ in range(3):
        started = time.process_time()  # the machine is shared
        model = model_of(c)
        source, dest = catalogue_for(model, layout(a, "megatron")), catalogue_for(model, layout(b, "engine"))
        plan = make_plan(source, dest)
        assert plan.digest
        best = min(best, time.process_time() - started)
    assert abs(plan.source.tensors.shape.prod(1).sum() / parameters - 1) < 0.002
    assert best < seconds
