"""Trainer and engine ranks of one torch.distributed group, on any number of machines: point-to-point messages by plan, one a
pair of ranks and bucket, over gloo or NCCL.

A message is packed and unpacked by the copy engine, so a byte is copied twice besides the wire. Tested over gloo on CPUs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..catalogue import Catalogue, Ints
from ..memory import Bound, Places, copies, run
from ..plan import Plan
from ..session import Transfer
from ..states import MODES, PeerLost, RefitError, StaleEpoch, Weights

BUCKET = 64 << 20
_BEGIN, _GO, _DATA, _COMMIT, _FAIL, _STOP = range(6)


class _Side:
    """Messages between one of the plan's source ranks and one of its destination ranks."""

    def __init__(
        self, plan: Plan, sources: Sequence[int], dests: Sequence[int], device: torch.device, group: Any, bucket: int
    ) -> None:
        if len(sources) != plan.source.ranks or len(dests) != plan.dest.ranks:
            raise RefitError(f"ranks: expected {plan.source.ranks} and {plan.dest.ranks}, got {len(sources)} and {len(dests)}")
        self.plan, self.sources, self.dests = plan, list(sources), list(dests)
        self.device, self.group, self.bucket = device, group, bucket
        self._word = int(plan.digest[:15], 16)

    def tell(self, to: int, *words: int) -> None:
        self._guarded(
            lambda: dist.send(torch.tensor([*words, *[0] * (5 - len(words))], device=self.device), to, self.group), to
        )

    def hear(self, of: int) -> list[int]:
        words = torch.zeros(5, dtype=torch.int64, device=self.device)
        self._guarded(lambda: dist.recv(words, of, self.group), of)
        return words.tolist()

    def tables(self, ops: Ints, source: Places | None, dest: Places | None) -> list[tuple[Ints, Tensor]]:
        """(copies between parameters and a message, the message), in buckets."""
        out = []
        table = copies(self.plan, ops, source, dest)
        nbytes = table[:, 2] * table[:, 3]
        cuts = np.flatnonzero(np.diff((np.cumsum(nbytes) - nbytes) // self.bucket)) + 1
        for part in np.split(table, cuts):
            size = part[:, 2] * part[:, 3]
            message = torch.empty(int(size.sum()), dtype=torch.uint8, device=self.device)
            side = 1 if source is not None else 0
            part = part.copy()
            part[:, side] = message.data_ptr() + np.cumsum(size) - size
            part[:, 4 + side] = part[:, 3]
            out.append((np.ascontiguousarray(part), message))
        return out

    def copy(self, table: Ints) -> None:
        if self.device.type == "cuda":
            from .cuda_ipc import run_on_device

            run_on_device(table, self.device)
        else:
            run(table, threads=torch.get_num_threads())

    def _guarded(self, call: Any, rank: int) -> None:
        try:
            call()
        except RuntimeError as error:
            raise PeerLost(f"rank {rank}: it is gone ({str(error).splitlines()[0]})") from error


class CollectiveSource(_Side):
    """The `Target` of a trainer rank; every trainer rank calls `refit` of its session with the same version.

    Args:
        plan: of all ranks on both sides.
        rank: which of the plan's source ranks this is.
        sources, dests: the ranks in `group` of the plan's source and destination ranks.
    """

    atomic = False

    def __init__(
        self, plan: Plan, rank: int, tensors: Mapping[str, Tensor], sources: Sequence[int], dests: Sequence[int], *,
        group: Any = None, bucket: int = BUCKET,
    ) -> None:  # fmt: skip
        super().__init__(plan, sources, dests, next(iter(tensors.values())).device, group, bucket)
        self.rank = rank
        self._bound = Bound(plan.source, rank, tensors, self._bind)
        self.nbytes = int(plan.nbytes[plan.between(rank)].sum())

    def _bind(self, places: Places) -> None:
        ops = (self.plan.between(self.rank, d) for d in range(self.plan.dest.ranks))
        self._out = [self.tables(o, places, None) for o in ops]

    def begin(self, epoch: int, version: int, mode: str, timeout: float) -> None:
        for to in self.dests:
            self.tell(to, _BEGIN, epoch, version, self._word, MODES.index(mode))
        answers = [self.hear(of) for of in self.dests]  # all of them, or the next attempt would hear the rest
        for of, (kind, theirs, *_) in zip(self.dests, answers, strict=True):
            if kind != _GO or theirs != epoch:
                raise RefitError(f"rank {of}: refused attempt {epoch}; it is at {theirs}")

    def transfer(self, epoch: int) -> Transfer:
        self._bound.refresh()
        for d, buckets in enumerate(self._out):
            for table, message in buckets:
                self.copy(table)
                self.tell(self.dests[d], _DATA, epoch)  # or the receiver would take word of a failure for weights
                self._guarded(lambda m=message, d=d: dist.send(m, self.dests[d], self.group), self.dests[d])
        return Transfer(self.nbytes, 2)

    def commit(self, epoch: int, version: int) -> None:
        for to in self.dests:
            self.tell(to, _COMMIT, epoch)
        answers = [self.hear(of) for of in self.dests]
        for of, (kind, theirs, got, *_) in zip(self.dests, answers, strict=True):
            if kind != _COMMIT or theirs != epoch or got != version:
                raise RefitError(f"rank {of}: did not commit attempt {epoch}")

    def fail(self, epoch: int, reason: str) -> None:
        for to in self.dests:
            self.tell(to, _FAIL, epoch)

    def close(self) -> None:
        for to in self.dests:
            self.tell(to, _STOP)


class CollectiveDest(_Side):
    """An engine rank's side: `serve` until the trainer closes."""

    def __init__(
        self, plan: Plan, rank: int, tensors: Mapping[str, Tensor], weights: Weights, sources: Sequence[int],
        dests: Sequence[int], *, group: Any = None, bucket: int = BUCKET, timeout: float = 600.0,
    ) -> None:  # fmt: skip
        super().__init__(plan, sources, dests, next(iter(tensors.values())).device, group, bucket)
        if weights.slots != 1:
            raise RefitError(f"weights: expected one slot, the one of `tensors`, got {weights.slots}")
        self.rank, self.weights, self.timeout = rank, weights, timeout
        self._written = False  # something, in the attempt under way
        self._bound = Bound(plan.dest, rank, tensors, self._bind)

    def _bind(self, places: Places) -> None:
        ops = (self.plan.between(s, self.rank) for s in range(self.plan.source.ranks))
        self._in = [self.tables(o, None, places) for o in ops]

    def serve(self) -> None:
        """Takes refits, one after another, in the calling thread.

        Raises:
            PeerLost: a trainer rank is gone; in the middle of a refit the weights are poisoned, as by any other error.
        """
        while self._one():
            pass

    def _one(self) -> bool:
        asked = [self.hear(of) for of in self.sources]
        if any(words[0] == _STOP for words in asked):
            return False
        if all(words[0] == _FAIL for words in asked):
            return True
        epoch, version, digest, mode = asked[0][1:]
        try:
            if any(words != asked[0] for words in asked) or asked[0][0] != _BEGIN or digest != self._word:
                raise StaleEpoch("the trainer's ranks do not agree with each other, or not with this plan")
            self._bound.refresh()
            self.weights.begin(epoch, version, MODES[mode], self.timeout)
            self._written = False
        except (RefitError, ValueError, IndexError):
            for to in self.sources:
                self.tell(to, _FAIL, self.weights.epoch)
            return True
        try:
            for to in self.sources:
                self.tell(to, _GO, epoch)
            whole = [self._take(s, epoch) for s in range(len(self.sources))]
            ends = [ok and self.hear(of)[:2] == [_COMMIT, epoch] for ok, of in zip(whole, self.sources, strict=True)]
            if all(ends):
                self._fill_pads()
                self._settle()
                self.weights.commit(epoch)
            else:
                for to, commits in zip(self.sources, ends, strict=True):
                    if commits:  # it waits for an answer, and says then that it gives up
                        self.tell(to, _FAIL, epoch)
                        self.hear(to)
                self.weights.fail(epoch, "the trainer gave it up", written=self._written)
                return True
        except BaseException as error:
            self.weights.fail(epoch, str(error), written=self._written)
            raise
        for to in self.sources:
            self.tell(to, _COMMIT, epoch, version)
        return True

    def _take(self, s: int, epoch: int) -> bool:
        """What a source sends; whether that was all of it."""
        of = self.sources[s]
        for table, message in self._in[s]:
            if self.hear(of)[:2] != [_DATA, epoch]:
                return False
            self._guarded(lambda: dist.recv(message, of, self.group), of)
            self._written = True
            self.copy(table)
        return True

    def _fill_pads(self) -> None:
        p: Catalogue = self.plan.dest
        for param, row, col, rows, cols in p.pads.tolist():
            if p.params.rank[param] == self.rank:
                shape = p.params.shape[param].tolist()
                self._bound.tensors[p.params.names[param]].detach().view(shape)[row : row + rows, col : col + cols] = 0

    def _settle(self) -> None:
        """Until the device has done what was asked of it: other streams read the weights once they are served."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
