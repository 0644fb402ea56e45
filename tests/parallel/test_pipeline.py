"""The schedules: complete, free of deadlock, as idle as they must be, and no message overtakes another."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from fastrlhf.parallel import Stages
from fastrlhf.parallel.pipeline import Action, apart, bubble, links, makespan, schedule
from fastrlhf.training.layout import Layout, ParallelConfig

from .processes import spawn

SHAPES = [(pp, v, m) for pp in (2, 3, 4, 8) for v in (1, 2, 3) for m in (0, 1, 2, 3, 4, 5, 7, 8, 16)]


@pytest.mark.parametrize(("pp", "interleave", "batches"), SHAPES)
def test_every_micro_batch_goes_through_every_chunk_and_back(pp: int, interleave: int, batches: int) -> None:
    plan = schedule(pp, interleave, batches)
    every = {Action(f, i, c) for f in (True, False) for i in range(batches) for c in range(interleave)}
    for actions in plan:
        assert set(actions) == every and len(actions) == len(every)
        for i in range(batches):
            for c in range(interleave):
                assert actions.index(Action(True, i, c)) < actions.index(Action(False, i, c))
    assert makespan(plan, interleave) is not None


@pytest.mark.parametrize(("pp", "interleave", "batches"), SHAPES)
def test_neighbours_send_and_receive_in_one_order(pp: int, interleave: int, batches: int) -> None:
    plan = schedule(pp, interleave, batches)
    for forward in (True, False):
        orders = {tuple((a.batch, a.chunk) for a in actions if a.forward is forward) for actions in plan}
        assert len(orders) == 1
    if interleave > 1 and batches:  # the way around: what the last rank sends of chunk c the first takes into c + 1
        sent = [(a.batch, a.chunk + 1) for a in plan[-1] if a.forward and a.chunk < interleave - 1]
        assert sent == [(a.batch, a.chunk) for a in plan[0] if a.forward and a.chunk]


def rests_on(plan: Sequence[Sequence[Action]], interleave: int) -> dict[tuple[bool, int, int], set[tuple[bool, int, int]]]:
    """Of every action, by stage, those that must be done before it."""
    last = len(plan) * interleave - 1
    found: dict[tuple[bool, int, int], set[tuple[bool, int, int]]] = {}

    def of(rank: int, k: int) -> set[tuple[bool, int, int]]:
        action = plan[rank][k]
        stage = action.chunk * len(plan) + rank
        key = (action.forward, action.batch, stage)
        if key not in found:
            found[key] = set()
            before = [(rank, k - 1)] if k else []
            source = stage + (-1 if action.forward else 1)
            if 0 <= source <= last:
                wanted = Action(action.forward, action.batch, source // len(plan))
                before.append((source % len(plan), plan[source % len(plan)].index(wanted)))
            for r, i in before:
                a = plan[r][i]
                found[key] |= of(r, i) | {(a.forward, a.batch, a.chunk * len(plan) + r)}
        return found[key]

    for rank, actions in enumerate(plan):
        for k in range(len(actions)):
            of(rank, k)
    return found


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize(("pp", "interleave", "batches"), [s for s in SHAPES if s[0] <= 4 and s[2] <= 8])
def test_no_receive_is_posted_before_what_it_waits_for(pp: int, interleave: int, batches: int, backward: bool) -> None:
    plan = schedule(pp, interleave, batches, backward)
    before = rests_on(plan, interleave)
    for rank, (actions, early) in enumerate(zip(plan, apart(pp, interleave, batches, backward), strict=True)):
        assert len(early) == max(len(actions), 1)
        for k, action in enumerate(actions[:-1]):
            coming = actions[k + 1]
            source = coming.chunk * pp + rank + (-1 if coming.forward else 1)
            if 0 <= source < pp * interleave:
                this = (action.forward, action.batch, action.chunk * pp + rank)
                wanted = (coming.forward, coming.batch, source)
                assert early[k] is (this != wanted and this not in before[wanted]), (rank, k)
    if interleave == 1 and batches >= 2 * pp:  # most of them do come in early
        assert all(sum(early) > len(early) // 3 for early in apart(pp, interleave, batches, backward)[1:])


@pytest.mark.parametrize(("pp", "interleave"), [(2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (8, 3)])
def test_every_link_of_a_run_is_made_before_it(pp: int, interleave: int) -> None:
    used = set()
    for rank, actions in enumerate(schedule(pp, interleave, 4)):
        for action in actions:
            stage, on = action.chunk * pp + rank, 1 if action.forward else -1
            if 0 <= stage + on < pp * interleave:
                around = "around_" if pp == 2 and min(stage, stage + on) % 2 else ""
                used.add((around + ("forward" if action.forward else "backward"), rank, (stage + on) % pp))
    assert sorted(used) == sorted(links(pp, interleave))


def connected(rank: int, interleave: int) -> list[tuple[int, int]]:
    """The messages of this process while a layout is made."""
    sent: list[tuple[int, int]] = []

    def send(rows: torch.Tensor, dst: int, group: dist.ProcessGroup) -> None:
        sent.append((rank, dst))
        plain(rows, dst=dst, group=group)

    plain, dist.send = dist.send, send
    Layout.create(ParallelConfig(pp=3, interleave=interleave))
    return sent


def test_a_layout_connects_its_stages() -> None:
    sent = [message for messages in spawn(3, connected, 2) for message in messages]
    assert sorted(sent) == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]


@pytest.mark.parametrize(("pp", "batches"), [(2, 4), (4, 4), (4, 16), (8, 32)])
@pytest.mark.parametrize("interleave", [1, 2, 4])
def test_the_bubble_is_that_of_the_papers(pp: int, interleave: int, batches: int) -> None:
    assert bubble(pp, interleave, batches) == pytest.approx((pp - 1) / (interleave * batches + pp - 1))


@pytest.mark.parametrize("pp", [2, 4, 8])
def test_a_rank_holds_no_more_than_1f1b_needs(pp: int) -> None:
    for rank, actions in enumerate(schedule(pp, 1, 32)):
        flying = most = 0
        for action in actions:
            flying += 1 if action.forward else -1
            most = max(most, flying)
        assert most == pp - rank


def test_scoring_has_no_backward() -> None:
    assert schedule(3, 1, 2, backward=False) == ((Action(True, 0, 0), Action(True, 1, 0)),) * 3


@pytest.mark.parametrize(
    ("stages", "sizes"),
    [
        (Stages(8, 4), (2, 2, 2, 2)),
        (Stages(10, 4), (2, 3, 3, 2)),  # the ends have the embedding and the head as well
        (Stages(11, 4), (3, 3, 3, 2)),
        (Stages(9, 2, 2), (2, 3, 2, 2)),
        (Stages(6, 3, split=(1, 3, 2)), (1, 3, 2)),
    ],
)
def test_layers_of_stages(stages: Stages, sizes: tuple[int, ...]) -> None:
    assert stages.sizes == sizes
    held = [i for rank in range(stages.pp) for chunk in stages.of_rank(rank) for i in chunk]
    assert sorted(held) == list(range(stages.layers))
    assert stages.layers_of(1) == range(sizes[0], sizes[0] + sizes[1])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layers": 4, "pp": 2, "interleave": 3}, r"4 cannot be cut into 6 stages \(pp 2 x interleave 3\)"),
        ({"layers": 4, "interleave": 2}, "interleave: expected >= 1, and 1 without a pipeline, got 2 with pp=1"),
        ({"layers": 4, "pp": 2, "split": (1, 2)}, r"split: expected 2 numbers >= 1 that add up to 4 layers, got \[1, 2\]"),
        ({"layers": 4, "pp": 2, "split": (4, 0)}, r"split: expected 2 numbers"),
    ],
)
def test_what_cannot_be_cut(given: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stages(**given)  # type: ignore[arg-type]
