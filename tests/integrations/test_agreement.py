"""A comparison leaves the process as it is, for its other threads too."""

from __future__ import annotations

import logging
import threading

import torch
from fastrlhf.integrations.agreement import compare
from fastrlhf.integrations.seam import Call, decline, declines


def formula(x):
    return (x * x - 1e8) / 1e3


def exact(x):
    return formula(x.double()).to(x.dtype)


CALL = Call("an offset", (torch.full((3,), 1e4) + torch.arange(3.0) / 7,), tolerance=1e-6)


def test_the_default_dtype_of_other_threads_stays():
    """The host's function is run in float64 where ours and its result differ."""
    seen, inside, go = [], threading.Event(), threading.Event()

    def host(x):
        if x.dtype == torch.float64:
            inside.set()
            go.wait(20)
        out = torch.zeros(len(x)) + torch.full((3,), 0.1) - 0.1
        out[:] += formula(x.float())
        return out

    def other():
        inside.wait(20)
        seen.append(torch.zeros(1).dtype)
        go.set()

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    assert compare(host, exact, CALL).hosts_error > 1e-6
    thread.join(20)
    assert seen == [torch.float32]


def test_random_numbers_of_a_host_do_not_move_the_state():
    state = torch.get_rng_state()
    compare(lambda x: x + 0 * torch.rand(3), lambda x: x, CALL)
    assert torch.equal(state, torch.get_rng_state())


def test_declines_end_in_any_order_and_belong_to_their_thread(caplog):
    with declines() as outer:
        with declines() as inner:
            decline("toy", "inner")
        decline("toy", "outer")
        thread = threading.Thread(target=decline, args=("toy", "another thread's"))
        with caplog.at_level(logging.WARNING):
            thread.start()
            thread.join()
    assert inner == ["inner"] and outer == ["outer"] and "another thread's" in caplog.text
