"""Parameters that lie elsewhere than at the last refit, as after a flat buffer was made anew (miles#1923): every transport that
keeps addresses copies from where they are now, and plans its copies again only then."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fastrlhf.refit import RefitError, Session, State, Weights
from fastrlhf.refit.memory import Bound, Places
from fastrlhf.refit.plan import make_plan
from fastrlhf.refit.refitter import RefitterTarget
from fastrlhf.refit.transports import collective
from fastrlhf.refit.transports.collective import CollectiveDest, CollectiveSource

from ..generation import fakes
from . import test_cuda_ipc, test_host
from .test_cuda_ipc import matrix

Tensors = dict[str, torch.Tensor]


class Wire:
    """torch.distributed's send and recv between two threads; a rank's group is (its rank, the mailboxes)."""

    def send(self, t: torch.Tensor, to: int, group: Any) -> None:
        group[1][group[0], to].put(t.clone())

    def recv(self, t: torch.Tensor, of: int, group: Any) -> None:
        t.copy_(group[1][of, group[0]].get(timeout=5))


@contextmanager
def over_shared_memory(tensors: Tensors) -> Iterator[tuple[Any, Callable[[], torch.Tensor]]]:
    engine = test_host.Engine(1)
    target = test_host.PosixShm([engine.connect()], matrix(), tensors, threads=1)
    yield target, lambda: torch.frombuffer(engine.arena, dtype=torch.float32, count=32).view(8, 4)
    target.close()


@contextmanager
def on_one_gpu(tensors: Tensors) -> Iterator[tuple[Any, Callable[[], torch.Tensor]]]:
    engine = test_cuda_ipc.Engine(test_cuda_ipc.Here())
    target = engine.trainer(tensors["w"])
    yield target, lambda: engine.param
    assert engine.device.opens == 1
    target.close()


@contextmanager
def by_messages(tensors: Tensors) -> Iterator[tuple[Any, Callable[[], torch.Tensor]]]:
    plan, boxes = make_plan(matrix(), matrix()), {pair: queue.Queue() for pair in ((0, 1), (1, 0))}
    params = {"w": torch.zeros(8, 4)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collective, "dist", Wire())
        dest = CollectiveDest(plan, 0, params, Weights(1), [0], [1], group=(1, boxes))
        thread = threading.Thread(target=dest.serve)
        thread.start()
        target = CollectiveSource(plan, 0, tensors, [0], [1], group=(0, boxes))
        yield target, lambda: params["w"]
        params["w"].data = torch.zeros(8, 4)  # the engine's too
        Session(target, epoch=9).refit(9)
        assert torch.equal(params["w"], tensors["w"])
        target.close()
        thread.join()


@contextmanager
def into_tensorrt(tensors: Tensors) -> Iterator[tuple[Any, Callable[[], torch.Tensor]]]:
    refitter = fakes.FakeRefitter({"w": ("float32", 32)})
    target = RefitterTarget(fakes.FakeTensorRT, refitter, matrix(), tensors, matrix())
    yield target, lambda: refitter.engine["w"].view(8, 4)


@pytest.mark.parametrize("transport", [over_shared_memory, on_one_gpu, by_messages, into_tensorrt])
def test_parameters_that_moved(transport: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"w": torch.full((8, 4), 0.0)}
    bound = 0
    of_tensors = Places.of_tensors

    def counted(*args: Any) -> Places:
        nonlocal bound
        bound += 1
        return of_tensors(*args)

    with transport(tensors) as (target, served):
        monkeypatch.setattr(Places, "of_tensors", counted)
        session = Session(target)
        for version in range(2):
            tensors["w"].fill_(version)
            session.refit(version)
            assert torch.equal(served(), tensors["w"])
        assert bound == 0  # labs-molt#26: nothing is stale that lies where it lay
        old = tensors["w"].data
        tensors["w"].data = torch.full((8, 4), 7.0)
        session.refit(2)
        assert old.eq(1).all() and served().eq(7).all() and bound == 1
        monkeypatch.undo()


def test_what_is_bound_is_looked_at_again() -> None:
    """A tensor that became another shape or dtype is refused, and nothing was written."""
    tensors = {"w": torch.zeros(8, 4)}
    with over_shared_memory(tensors) as (target, _):
        session = Session(target)
        session.refit(0)
        tensors["w"].data = torch.zeros(8, 4, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"expected .* of float32, got a tensor .* of torch.float64"):
            session.refit(1)
        assert target.state()["state"] == "serving" and session.state is State.POISONED


@pytest.mark.parametrize("error", [RuntimeError("CUDA: the copies were not launched, error 2"), KeyboardInterrupt()])
def test_an_engine_rank_whose_copy_fails(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, weights = make_plan(matrix(), matrix()), Weights(1, version=0)
    monkeypatch.setattr(collective, "dist", Wire())
    boxes = {pair: queue.Queue() for pair in ((0, 1), (1, 0))}
    dest = CollectiveDest(plan, 0, {"w": torch.zeros(8, 4)}, weights, [0], [1], group=(1, boxes))
    trainer = CollectiveSource(plan, 0, {"w": torch.ones(8, 4)}, [0], [1], group=(0, boxes))

    def fails(table: Any) -> None:
        raise error

    dest.copy = fails  # type: ignore[method-assign]
    trainer.tell(1, 0, 1, 1, trainer._word, 0)
    trainer.fail(1, "another rank refused it")
    assert dest._one() and weights.state is State.SERVING  # nothing was written
    trainer.tell(1, 0, 2, 1, trainer._word, 0)
    trainer.transfer(2)
    with pytest.raises(type(error)):
        dest.serve()
    assert weights.state is State.POISONED
    with pytest.raises(RefitError, match="expected one slot, the one of `tensors`, got 2"):
        CollectiveDest(plan, 0, {"w": torch.zeros(8, 4)}, Weights(2), [0], [1])


def test_bound_tells_the_same_memory_of_another_form() -> None:
    seen: list[int] = []
    tensors = {"w": torch.zeros(8, 4)}
    bound = Bound(matrix(), 0, tensors, lambda places: seen.append(int(places.pitch[0])))
    bound.refresh()
    wide = torch.zeros(8, 6)
    tensors["w"].data = wide[:, :4]
    bound.refresh()
    assert seen == [16, 24]
