"""The queue of a fleet, its replicas stepped in one process: a step is a token of each of their sequences."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from fastrlhf.generation import Completion
from fastrlhf.generation.embedded.queue import Board, Expected, Order, Queue, Seen, Share, dealt
from hypothesis import given, settings
from hypothesis import strategies as st

SLOTS = 16


class CountingStore(dist.HashStore):
    def __init__(self) -> None:
        super().__init__()
        self.keys: set[str] = set()

    def add(self, key, amount):
        self.keys.add(key)
        return super().add(key, amount)

    def set(self, key, value):
        self.keys.add(key)
        super().set(key, value)

    def delete_key(self, key):
        self.keys.discard(key)
        return super().delete_key(key)


def run(lengths, replicas=4, slots=SLOTS, expected=None, within=()):
    """(begun, in order; the step in which each replica ended; keys left in the store) of prescribed lengths (prompt, sample)."""
    store = CountingStore()
    n = len(lengths[0])
    expected = expected or [None] * len(lengths)
    queues = [Queue(expected, n, within, slots, Board(store, r, replicas)) for r in range(replicas)]
    running: list[list[list[int]]] = [[] for _ in range(replicas)]
    begun, ends, step = [], [0] * replicas, 0
    over = [False] * replicas
    while not all(over):
        step += 1
        for r, queue in enumerate(queues):
            if over[r]:
                continue
            for share in queue(len(running[r])):
                for sample in range(share.first, share.first + share.samples):
                    begun.append((share.prompt, sample))
                    running[r].append([share.prompt, sample, lengths[share.prompt][sample]])
            assert len(running[r]) <= slots
            if not running[r]:
                over[r], ends[r] = True, step - 1
        for r, queue in enumerate(queues):
            for sequence in running[r]:
                sequence[2] -= 1
                if not sequence[2]:
                    queue.finished(sequence[0], sequence[1], lengths[sequence[0]][sequence[1]])
            running[r] = [sequence for sequence in running[r] if sequence[2]]
    for queue in queues:
        queue.close()
    return begun, ends, store.keys


def long_tailed(prompts: int, n: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    of_prompt = torch.randn(prompts, 1, generator=generator)
    drawn = (3.2 + 0.9 * of_prompt + 0.45 * torch.randn(prompts, n, generator=generator)).exp().clamp(1, 400)
    return drawn.long().tolist()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 5), st.integers(1, 5), st.integers(1, 9), st.floats(0, 1), st.integers(0, 1000),
)  # fmt: skip
def test_every_sample_is_drawn_once_and_the_store_is_left_empty(prompts, n, replicas, slots, known, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (prompts, n), generator=generator).tolist()
    expected = [float(x) if x < 30 * known else None for x in torch.randint(0, 30, (prompts,), generator=generator)]
    begun, _, keys = run(lengths, replicas, slots, expected)
    assert sorted(begun) == [(i, j) for i in range(prompts) for j in range(n)]
    assert not keys


def idle(ends: list[int]) -> float:
    return 1 - sum(ends) / (max(ends) * len(ends))


def dealt_beforehand(lengths, replicas=4, slots=SLOTS):
    """The steps of replicas that draw each its part of the prompts."""
    ends = []
    for r in range(replicas):
        waiting = [x for prompt in lengths[r::replicas] for x in prompt]
        running: list[int] = []
        step = 0
        while waiting or running:
            while waiting and len(running) < slots:
                running.append(waiting.pop(0))
            running = [x - 1 for x in running if x > 1]
            step += 1
        ends.append(step)
    return ends


def few_long(prompts: int, n: int, seed: int) -> list[list[int]]:
    """Three prompts in sixty-four have long completions."""
    long = set(torch.randperm(prompts, generator=torch.Generator().manual_seed(seed))[: prompts * 3 // 64].tolist())
    return [[300 if i in long else 20] * n for i in range(prompts)]


def both(draw, slots, known=False, seeds=5):
    """(idle, steps) of parts dealt beforehand and of the queue, each added up over some draws, and the worst step of the queue
    as a share of what all slots would need without a pause."""
    static, queued, worst = [0.0, 0], [0.0, 0], 0.0
    for seed in range(seeds):
        lengths = draw(seed)
        expected = [sum(own) / len(own) for own in lengths] if known else None
        for total, ends in ((static, dealt_beforehand(lengths, slots=slots)), (queued, run(lengths, 4, slots, expected)[1])):
            total[0] += idle(ends)
            total[1] += max(ends)
        worst = max(worst, max(ends) / (sum(map(sum, lengths)) / (4 * slots)))
    return static, queued, worst


@pytest.mark.parametrize(("prompts", "n"), [(128, 8), (64, 16), (256, 4)])
def test_prompts_never_seen_before_leave_no_replica_idle_half_as_long(prompts, n):
    static, queued, worst = both(lambda seed: long_tailed(prompts, n, seed), SLOTS)
    assert queued[0] < 0.3 * static[0] and queued[1] < 0.85 * static[1]
    assert worst < 1.25


@pytest.mark.parametrize("known", [False, True])
def test_the_benchmarks_case_is_idle_less_than_half_as_long(known):
    static, queued, _ = both(lambda seed: long_tailed(64, 8, seed), SLOTS, known, seeds=16)
    assert queued[0] < 0.5 * static[0] and queued[1] < 0.85 * static[1]


@pytest.mark.parametrize("slots", [16, 48, 128, 256])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    "draw",
    [lambda seed: [[100] * 8] * 64, lambda seed: long_tailed(64, 8, seed), lambda seed: few_long(64, 8, seed)],
    ids=["equal", "long-tailed", "few long"],
)
def test_the_queue_takes_no_more_steps_than_parts_dealt_beforehand(draw, known, slots):
    static, queued, _ = both(draw, slots, known)
    assert queued[1] <= 1.05 * static[1]
    assert queued[0] <= static[0] + 5 * 0.02


def test_what_can_be_under_way_at_once_is_dealt_beforehand():
    assert dealt([None] * 5, 2, 2) == [
        [Share(0, 0, 2), Share(2, 0, 2), Share(4, 0, 1)], [Share(1, 0, 2), Share(3, 0, 2), Share(4, 1, 1)],
    ]  # fmt: skip
    assert dealt([1.0, 9.0, 4.0, 4.0], 1, 2) == [[Share(1, 0, 1), Share(0, 0, 1)], [Share(2, 0, 1), Share(3, 0, 1)]]
    assert dealt([5.0], 3, 4) == [[Share(0, 0, 1)], [Share(0, 1, 1)], [Share(0, 2, 1)], []]
    _, ends, keys = run([[100] * 4] * 64, slots=256)
    assert ends == [100] * 4 and not keys


def test_one_sample_of_each_prompt_comes_first_and_then_those_that_were_long():
    lengths = [[5] * 4 if i % 4 else [60] * 4 for i in range(64)]
    begun, _, _ = run(lengths, replicas=2, slots=8)
    assert {sample for _, sample in begun[:64]} == {0}
    rest = [lengths[prompt][sample] for prompt, sample in begun[64:]]
    # sixteen prompts with three more samples each; the first batches are made while some of them are still young
    assert sum(x == 60 for x in rest[:72]) >= 44


def test_prompts_of_which_something_is_known_come_longest_first():
    expected = [3.0, 50.0, 7.0, 20.0] * 4
    lengths = [[int(x)] * 2 for x in expected]
    begun, _, keys = run(lengths, replicas=2, slots=4, expected=expected)
    assert [lengths[prompt][0] for prompt, _ in begun] == sorted([int(x) for x in expected] * 2, reverse=True)
    assert not keys


def test_an_order_is_the_same_for_whoever_asks():
    store = dist.HashStore()
    boards = [Board(store, r, 2) for r in range(2)]
    orders = [Order([None] * 20, 3, 8, board) for board in boards]
    for board in boards:
        board.tell(Seen({0: (1, 5)}, {7: [90]}))
    assert orders[0].head == orders[1].head == [Share(i, 0, 1) for i in range(8)]
    taken = [orders[place % 2][place] for place in range(len(orders[0]))]
    assert taken[12:14] == [Share(7, 1, 1), Share(7, 2, 1)]
    assert len(set(taken)) == 52


def test_what_is_expected_is_what_the_last_completions_were():
    expected = Expected()
    assert expected([1, 2]) is None
    expected.learn(
        [[1, 2], [3]], [[Completion([1] * 4, [], "stop"), Completion([1] * 8, [], "stop")], [Completion([], [], "stop")]]
    )
    assert (expected([1, 2]), expected([3]), expected([4])) == (6.0, 0.0, None)
