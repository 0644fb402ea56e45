"""Trainer and engine ranks over gloo."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fastrlhf.refit import PeerLost, RefitError, Session, State, Weights
from fastrlhf.refit.layouts import catalogue_for, layout
from fastrlhf.refit.plan import make_plan
from fastrlhf.refit.shapes import model_of
from fastrlhf.refit.transports.collective import CollectiveDest, CollectiveSource

from .oracle import Split, config, whole

A, B = layout("tp2", "megatron"), layout("tp2", "engine")


def ranks(rank: int, directory: str) -> None:
    """0 and 1 are the trainer's, 2 and 3 the engine's."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=4)
    c = config(num_key_value_heads=1)
    plan = make_plan(catalogue_for(model_of(c), A), catalogue_for(model_of(c), B))
    tensors = whole(plan.source)
    if rank < 2:
        held = {n: t.contiguous().clone() for (r, n), t in Split(c, A, tensors).out.items() if r == rank}
        target = CollectiveSource(plan, rank, held, [0, 1], [2, 3], bucket=4096)
        assert max(len(b) for b in target._out) > 2
        session = Session(target)
        for version in (0, 1):
            assert session.refit(version).nbytes == target.nbytes
            for t in held.values():
                t += 1
        session.epoch = 0  # an attempt of the past
        try:
            session.refit(2)
            raise AssertionError("an old epoch was taken")
        except RefitError as error:
            assert "refused attempt 1; it is at 2" in str(error)
        session.epoch = 2
        session.refit(2)
        copy = target.copy
        if rank == 0:  # fails between two buckets; the other rank goes on and is told when it commits
            copies = iter([copy])
            target.copy = lambda table: next(copies)(table)  # type: ignore[method-assign]
        try:
            session.refit(3)
            raise AssertionError("half of it was taken")
        except (RefitError, StopIteration):
            assert session.state is State.POISONED
        target.copy = copy  # type: ignore[method-assign]
        session.refit(3)
        dist.barrier()
        if rank == 1:
            os._exit(0)  # in the middle of what the engine takes for a session
        target.tell(2, 0, 9, 3, target._word, 0)
        target.tell(3, 0, 9, 3, target._word, 0)
        os._exit(0)
    params = {
        n: torch.full(tuple(t.reshape(t.shape[0], -1).shape), float("nan"))
        for (r, n), t in Split(c, B, tensors).out.items()
        if r == rank - 2
    }
    weights = Weights(1)
    dest = CollectiveDest(plan, rank - 2, params, weights, [0, 1], [2, 3], bucket=4096)
    for step in range(7):  # the refused attempt is followed by its being given up
        assert dest._one()
        assert weights.version == (0, 1, 1, 1, 2, 2, 3)[step]
        assert weights.state is (State.POISONED if step == 5 else State.SERVING)
    for (r, n), t in Split(c, B, {k: v + 2 for k, v in tensors.items()}).out.items():
        if r == rank - 2:
            got = params[n].reshape(t.shape)
            rows = min(160, 301 - r * 160) if n.startswith(("model.embed", "lm_head")) else t.shape[0]
            assert torch.equal(got[:rows], t[:rows]), n
            assert not got[rows:].any()
    dist.barrier()
    try:
        dest.serve()
        raise AssertionError("nobody noticed")
    except PeerLost as error:
        assert "is gone" in str(error)
    assert weights.state is State.SERVING and weights.version == 3  # nothing of a new attempt was written
    Path(directory, f"done-{rank}").touch()
    os._exit(0)


@pytest.mark.slow  # four processes that import torch
def test_two_trainer_ranks_and_two_engine_ranks(tmp_path: Path) -> None:
    mp.spawn(ranks, (str(tmp_path),), nprocs=4)
    assert {p.name for p in tmp_path.glob("done-*")} == {"done-2", "done-3"}


def test_sizes_that_do_not_fit_are_refused() -> None:
    c = config()
    plan = make_plan(catalogue_for(model_of(c), A), catalogue_for(model_of(c), B))
    made: Any = None
    try:
        made = CollectiveSource(plan, 0, {"x": torch.zeros(1)}, [0], [1, 2])
    except RefitError as error:
        assert "expected 2 and 2, got 1 and 2" in str(error)
    assert made is None
