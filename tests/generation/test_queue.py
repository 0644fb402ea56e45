"""The queue of a fleet, its replicas stepped in one process: a step is a token of each of their sequences."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from fastrlhf.generation import Completion
from fastrlhf.generation.embedded.queue import Board, Expected, Order, Queue, Seen, Share
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


@pytest.mark.parametrize(("prompts", "n"), [(128, 8), (64, 16), (256, 4)])
def test_prompts_never_seen_before_leave_no_replica_idle_half_as_long(prompts, n):
    static, queued, longest = [], [], []
    for seed in range(5):
        lengths = long_tailed(prompts, n, seed)
        _, ends, _ = run(lengths)
        static.append(idle(dealt_beforehand(lengths)))
        queued.append(idle(ends))
        longest.append(max(ends) / (sum(map(sum, lengths)) / (4 * SLOTS)))
    assert sum(queued) < 0.3 * sum(static)
    assert max(longest) < 1.25  # of the time in which all slots of all replicas would have done it without a pause


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
