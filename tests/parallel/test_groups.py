"""The grid of processes: its order, what it refuses, its picture."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from fastrlhf.models import Decoder, DecoderConfig
from fastrlhf.parallel import ParallelGroups
from fastrlhf.parallel.groups import Axis, coordinates, grid, picture
from fastrlhf.training.layout import Layout, ParallelConfig

from .processes import spawn

CONFIG = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def seats(rank: int) -> dict[str, object]:
    groups = ParallelGroups.create(tp=2, pp=2, dp=1)
    axes = {name: getattr(groups, name) for name in ("tp", "pp", "dp", "replicas", "world", "ends")}
    out: dict[str, object] = {name: (axis.rank, axis.size, axis.ranks) for name, axis in axes.items()}
    out["place"], out["picture"] = groups.place, groups.picture()
    refused = []
    for sizes in ({"tp": 3}, {"tp": 2, "pp": 2, "dp": 2}, {"pp": 0}, {"cp": 2}):
        with pytest.raises(ValueError) as error:
            ParallelGroups.create(**sizes)
        refused.append(str(error.value))
    return out | {"refused": refused, "backend": dist.get_backend(groups.tp.group)}


def test_who_sits_where() -> None:
    found = spawn(4, seats)
    for rank, seat in enumerate(found):
        tp, pp = rank % 2, rank // 2
        assert seat["tp"] == (tp, 2, (2 * pp, 2 * pp + 1))
        assert seat["pp"] == seat["replicas"] == seat["ends"] == (pp, 2, (tp, tp + 2))
        assert seat["dp"] == (0, 1, (rank,)) and seat["world"] == (rank, 4, (0, 1, 2, 3))
        assert seat["place"] == f"rank {rank} (tp {tp}, pp {pp}, dp 0)" == coordinates(rank, 2, 2, 1)
        assert seat["refused"] == [
            "tp, pp: 3 x 1 does not divide the 4 process(es) of this run",
            "tp, pp, dp: 2 x 2 x 2 is 8, this run has 4 process(es)",
            "tp, pp, cp: expected sizes >= 1, got tp=1, pp=0, cp=1",
            "cp: there is no context parallelism, expected 1, got 2",
        ]


def waits(rank: int) -> str:
    """What an exchange of the dp group says, whose second process comes a second late, where half a second is allowed."""
    groups = Layout.create(ParallelConfig(timeout=0.5)).groups
    time.sleep(1.5 * rank)
    try:
        dist.all_reduce(torch.ones(1), group=groups.dp.group)
    except RuntimeError as error:
        return str(error)
    return "it waited"


def test_a_groups_exchanges_have_the_runs_timeout() -> None:
    assert "imed out" in spawn(2, waits)[0]


def test_the_picture() -> None:
    assert picture(2, 2, 2).splitlines() == [
        "8 processes: tp 2 x pp 2 x dp 2; a cell lists a tensor-parallel group's ranks",
        "       dp 0   dp 1",
        "pp 0   0 1    2 3",
        "pp 1   4 5    6 7",
    ]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 3, 4), (8, 4, 2)])
def test_every_axis_holds_every_process_once(sizes: tuple[int, int, int]) -> None:
    tp, pp, dp = sizes
    for name, rows in grid(*sizes).items():
        if name == "ends":
            continue
        assert sorted(r for row in rows for r in row) == list(range(tp * pp * dp)), name
        assert {len(row) for row in rows} == {{"tp": tp, "pp": pp, "dp": dp, "replicas": pp * dp}[name]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 8}, "num_attention_heads: 6 cannot be shared"),
        ({}, "num_key_value_heads: 2 cannot be shared evenly among 4"),
        ({"num_key_value_heads": 4, "vocab_size": 66}, "vocab_size: 66 cannot be shared"),
        ({"num_key_value_heads": 4, "intermediate_size": 50}, "intermediate_size: 50 cannot be shared"),
    ],
)
def test_a_model_that_tp_does_not_divide_is_refused_by_name(change: dict[str, int], message: str) -> None:
    groups = ParallelGroups(tp=Axis(None, 0, 4, (0, 1, 2, 3)))
    with pytest.raises(ValueError, match=message):
        Decoder(DecoderConfig.from_hf(CONFIG | change), groups=groups, device="meta")


def test_too_few_layers_for_a_pipeline_are_refused() -> None:
    groups = ParallelGroups(pp=Axis(None, 0, 3, (0, 1, 2)))
    with pytest.raises(ValueError, match=r"num_hidden_layers: 2 cannot be cut into 3 stages \(pp 3 x interleave 1\)"):
        Decoder(DecoderConfig.from_hf(CONFIG), groups=groups, device="meta")
