"""Pipeline parallelism: which layers are where, in which order a stage works, and how stages pass rows on.

The schedules are 1F1B (Narayanan et al. 2019; at most pp - rank micro-batches in flight) and, with several chunks of layers a
process, interleaved 1F1B (Narayanan et al. 2021). Micro-batches may differ in length: their lengths are known everywhere, so
nothing but the rows themselves is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .groups import ParallelGroups


@dataclass(frozen=True)
class Stages:
    """pp · interleave stages of consecutive layers; rank r of the pipeline holds stages r, r + pp, r + 2 pp, ...

    The embedding is with the first stage and the norm and the head with the last, so of layers that do not come out even
    the stages between get one more. `split`: how many layers each stage has, instead.

    Raises:
        ValueError: fewer layers than stages, or a split that does not add up to the layers.
    """

    layers: int
    pp: int = 1
    interleave: int = 1
    split: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.interleave < 1 or (self.pp == 1 and self.interleave > 1):
            raise ValueError(f"interleave: expected >= 1, and 1 without a pipeline, got {self.interleave} with pp={self.pp}")
        if self.layers < self.count:
            raise ValueError(
                f"num_hidden_layers: {self.layers} cannot be cut into {self.count} stages (pp {self.pp} x interleave "
                f"{self.interleave})"
            )
        if self.split is not None and (len(self.split) != self.count or sum(self.split) != self.layers or min(self.split) < 1):
            raise ValueError(
                f"split: expected {self.count} numbers >= 1 that add up to {self.layers} layers, got {list(self.split)}"
            )

    @property
    def count(self) -> int:
        return self.pp * self.interleave

    @property
    def sizes(self) -> tuple[int, ...]:
        """Layers of each stage."""
        if self.split is not None:
            return self.split
        base, extra = divmod(self.layers, self.count)
        order = [*range(1, self.count - 1), 0, self.count - 1]
        more = set(order[:extra])
        return tuple(base + (s in more) for s in range(self.count))

    def layers_of(self, stage: int) -> range:
        first = sum(self.sizes[:stage])
        return range(first, first + self.sizes[stage])

    def of_rank(self, rank: int) -> list[range]:
        """The layers of each chunk of a pipeline rank."""
        return [self.layers_of(chunk * self.pp + rank) for chunk in range(self.interleave)]


class Action(NamedTuple):
    """A micro-batch's forward or backward through one chunk of layers."""

    forward: bool
    batch: int
    chunk: int


@lru_cache(maxsize=256)
def schedule(pp: int, interleave: int, batches: int, backward: bool = True) -> tuple[tuple[Action, ...], ...]:
    """What each rank does, in order. Sends and receives of neighbours come in the same order, so that no message overtakes
    another."""
    if not backward:
        forwards, _ = _orders(pp, interleave, batches)
        return (tuple(forwards),) * pp
    limits = [(pp - r - 1) * (2 if interleave > 1 else 1) + (interleave - 1) * pp + 1 for r in range(pp)]
    while True:
        plan = tuple(tuple(_alternating(pp, interleave, batches, limit)) for limit in limits)
        if makespan(plan, interleave) is not None:
            return plan
        limits = [limit + 1 for limit in limits]  # a last group of less than pp micro-batches needs more room


def bubble(pp: int, interleave: int, batches: int) -> float:
    """The share of time that a rank waits, a backward costing two forwards; (pp - 1) / (interleave · batches + pp - 1) where
    pp divides the batches."""
    total = makespan(schedule(pp, interleave, batches), interleave)
    assert total is not None
    return 1 - 3 * batches * interleave / total


def makespan(plan: Sequence[Sequence[Action]], interleave: int) -> float | None:
    """Time from the first action to the last, a forward taking 1 and a backward 2; None where ranks wait for one another."""
    pp = len(plan)
    last = pp * interleave - 1
    at, free = [0] * pp, [0.0] * pp
    done: dict[tuple[bool, int, int], float] = {}
    while any(at[r] < len(plan[r]) for r in range(pp)):
        moved = False
        for r in range(pp):
            while at[r] < len(plan[r]):
                action = plan[r][at[r]]
                stage = action.chunk * pp + r
                needs = [(True, action.batch, stage - 1)] if action.forward and stage else []
                if not action.forward:
                    needs = [(True, action.batch, stage)] + ([(False, action.batch, stage + 1)] if stage < last else [])
                if any(n not in done for n in needs):
                    break
                start = max([free[r], *(done[n] for n in needs)])
                free[r] = done[action.forward, action.batch, stage] = start + (1 if action.forward else 2)
                at[r] += 1
                moved = True
        if not moved:
            return None
    return max(free)


@lru_cache(maxsize=256)
def apart(pp: int, interleave: int, batches: int, backward: bool = True) -> tuple[tuple[bool, ...], ...]:
    """Of each action of each rank, whether the rows of the next one come about without it.

    Only then is a receive for them posted before it is done: one that waits for what the same rank has yet to send may keep
    that from being sent, where both share a stream of the device.
    """
    plan = schedule(pp, interleave, batches, backward)
    last = pp * interleave - 1
    at, latest = [0] * pp, [[-1] * pp for _ in range(pp)]
    rests: dict[tuple[bool, int, int], list[int]] = {}  # the latest action of each rank that an action's outcome rests on

    def source(rank: int, action: Action) -> tuple[bool, int, int] | None:
        stage = action.chunk * pp + rank + (-1 if action.forward else 1)
        return (action.forward, action.batch, stage) if 0 <= stage <= last else None

    while any(at[r] < len(plan[r]) for r in range(pp)):
        for r in range(pp):
            while at[r] < len(plan[r]):
                action = plan[r][at[r]]
                needs = source(r, action)
                if needs is not None:
                    if needs not in rests:
                        break
                    latest[r] = [max(pair) for pair in zip(latest[r], rests[needs], strict=True)]
                latest[r][r] = at[r]
                rests[action.forward, action.batch, action.chunk * pp + r] = list(latest[r])
                at[r] += 1
    out = []
    for r, actions in enumerate(plan):
        following = [source(r, action) for action in actions[1:]]
        out.append((*(needs is not None and rests[needs][r] < k for k, needs in enumerate(following)), False))
    return tuple(out)


def _orders(pp: int, interleave: int, batches: int) -> tuple[list[Action], list[Action]]:
    """Forwards and backwards of every rank: pp micro-batches through one chunk, then through the next."""
    forwards, backwards = [], []
    for first in range(0, batches, pp if interleave > 1 else batches or 1):
        group = range(first, min(first + pp, batches) if interleave > 1 else batches)
        forwards += [Action(True, i, c) for c in range(interleave) for i in group]
        backwards += [Action(False, i, c) for c in reversed(range(interleave)) for i in group]
    return forwards, backwards


def _alternating(pp: int, interleave: int, batches: int, limit: int) -> list[Action]:
    forwards, backwards = _orders(pp, interleave, batches)
    out: list[Action] = []
    f = b = 0
    while b < len(backwards):
        if f < len(forwards) and f - b < limit:
            out.append(forwards[f])
            f += 1
        else:
            out.append(backwards[b])
            b += 1
    return out


def _channel(pp: int, low: int, forward: bool) -> str:
    """Of `Channels`, what goes between stage low and the next."""
    around = "around_" if pp == 2 and low % 2 == 1 else ""
    return around + ("forward" if forward else "backward")


def links(pp: int, interleave: int) -> list[tuple[str, int, int]]:
    """(channel, sender, receiver) of everything that ranks of a pipeline send, in the order of stages."""
    found: dict[tuple[str, int, int], None] = {}
    for low in range(pp * interleave - 1):
        here, there = low % pp, (low + 1) % pp
        found[_channel(pp, low, True), here, there] = None
        found[_channel(pp, low, False), there, here] = None
    return list(found)


def connect(groups: ParallelGroups, interleave: int) -> None:
    """One element over every link. Collective over the pipeline, before its first `run`.

    NCCL makes the communicator of two processes in their first exchange, and whoever comes first waits on the host for the
    other; a rank that expects the rows of its next action would so wait before it does this one. Not yet run on a GPU.
    """
    pp = groups.pp
    if pp.size == 1:
        return
    for name, sender, receiver in links(pp.size, interleave):
        group = getattr(groups.channels, name)
        device = "cuda" if "nccl" in dist.get_backend_config(group) else "cpu"
        if pp.rank == sender:
            dist.send(torch.zeros(1, device=device), dst=pp.ranks[receiver], group=group)
        elif pp.rank == receiver:
            dist.recv(torch.zeros(1, device=device), src=pp.ranks[sender], group=group)


class _Line:
    """What comes in and goes out of one rank of a pipeline, in order and in the background."""

    def __init__(self, groups: ParallelGroups, interleave: int) -> None:
        self.pp, self.channels, self.last = groups.pp, groups.channels, groups.pp.size * interleave - 1
        self._out: dict[Action, tuple[dist.Work, Tensor]] = {}
        self._room = 4 * groups.pp.size * interleave
        self._in: dict[Action, tuple[dist.Work, Tensor]] = {}

    def _stage(self, action: Action) -> int:
        return action.chunk * self.pp.size + self.pp.rank

    def source(self, action: Action) -> int | None:
        """The stage whose rows an action starts from; None for tokens and losses."""
        stage = self._stage(action) + (-1 if action.forward else 1)
        return stage if 0 <= stage <= self.last else None

    def _link(self, low: int, forward: bool) -> ProcessGroup | None:
        """Between stage low and the next."""
        group: ProcessGroup | None = getattr(self.channels, _channel(self.pp.size, low, forward))
        return group

    def _rank(self, stage: int) -> int:
        return self.pp.ranks[stage % self.pp.size]

    def expect(self, action: Action, like: Tensor) -> None:
        source = self.source(action)
        if source is None or action in self._in:
            return
        group = self._link(min(source, self._stage(action)), action.forward)
        work = dist.irecv(like, src=self._rank(source), group=group)
        assert work is not None
        self._in[action] = work, like

    def take(self, action: Action) -> Tensor:
        work, rows = self._in.pop(action)
        work.wait()
        self._arrived(Action(True, action.batch, action.chunk) if not action.forward else None)
        return rows

    def _arrived(self, sent: Action | None) -> None:
        """Let go of rows that were sent: those whose gradient has come back, and the oldest of more than there is room for."""
        if sent is None:
            sent = next(iter(self._out)) if len(self._out) > self._room else None
        if sent is not None and sent in self._out:
            self._out.pop(sent)[0].wait()

    def send(self, action: Action, rows: Tensor) -> None:
        """What an action made, to the stage that goes on with it."""
        stage = self._stage(action)
        to = stage + (1 if action.forward else -1)
        if not 0 <= to <= self.last:
            return
        self._arrived(None)
        rows = rows.detach().contiguous()
        work = dist.isend(rows, dst=self._rank(to), group=self._link(min(stage, to), action.forward))
        assert work is not None
        self._out[action] = work, rows

    def finish(self) -> None:
        for work, _ in self._out.values():
            work.wait()
        self._out = {}


def run(
    groups: ParallelGroups, interleave: int, batches: int, *, empty: Callable[[int], Tensor],
    forward: Callable[[int, int, Tensor | None], Tensor], last: Callable[[int, Tensor], Tensor | None], backward: bool,
) -> None:  # fmt: skip
    """Every micro-batch through the stages of a pipeline, and back.

    Collective over the pipeline, with the same number of batches on all of its ranks. Gradients add up in the parameters as
    they do without a pipeline: a micro-batch's is whole before the next one's is added.

    Args:
        empty: an uninitialised tensor for the rows of a micro-batch between stages.
        forward: (chunk, micro-batch, rows or None at the first stage) -> rows, or what `last` takes at the last stage.
        last: (micro-batch, what the last stage made) -> its loss, where there is a backward.
        backward: whether there is one.
    """
    line = _Line(groups, interleave)
    actions = schedule(groups.pp.size, interleave, batches, backward)[groups.pp.rank]
    early = apart(groups.pp.size, interleave, batches, backward)[groups.pp.rank]
    held: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
    for k, action in enumerate(actions):
        for coming in actions[k : k + 1 + early[k]]:  # the next one's rows come in while this one works
            if line.source(coming) is not None:
                line.expect(coming, empty(coming.batch))
        given = None if line.source(action) is None else line.take(action)
        key = action.batch, action.chunk
        if action.forward:
            if given is not None and backward:
                given.requires_grad_()
            made = forward(action.chunk, action.batch, given)
            if action.chunk == interleave - 1 and groups.pp.last:
                loss = last(action.batch, made)
                if loss is not None:
                    made = loss
            else:
                line.send(action, made)
            if backward:
                held[key] = given, made
        else:
            entered, made = held.pop(key)
            torch.autograd.backward([made], None if given is None else [given])
            if entered is not None:
                assert entered.grad is not None
                line.send(action, entered.grad)
    line.finish()
