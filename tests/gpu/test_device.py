"""What only a GPU can show: CUDA graphs, streams, no waiting for the device, no large temporaries, the same bits again."""

from __future__ import annotations

from collections.abc import Iterator

import fastrlhf
import pytest
import torch
from fastrlhf.ops import backend as backends

from tests.oracle import assert_accurate, assert_gradient_accurate

from .calls import CALLS, FLAGSHIP, LARGE, NARROW, TESTS, WIDE, Inputs, Maker, cases, execute

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BACKENDS = ("cuda", "triton")


def each(found: list[tuple[str, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("kernels", "name"), [pytest.param(b, n, id=f"{n}-{b}") for b, n in found])


@pytest.fixture(autouse=True)
def _built(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.callspec.params["kernels"] == "cuda" and backends.cuda_extension() is None:
        pytest.skip("the CUDA kernels are not part of this build")
    yield
    torch.cuda.synchronize()  # what went wrong on the device shows in the test that did it


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(
            x.nan_to_num(7, 8, 9) if x.is_floating_point() else x, y.nan_to_num(7, 8, 9) if y.is_floating_point() else y
        )
        for x, y in zip(a, b)
    )


@each(TESTS["test_graph"])
def test_graph(kernels: str, name: str) -> None:
    """Captured once, replayed on other inputs: what eager mode gives for those."""
    call = CALLS[name]
    static, fresh = call.make(Maker("cuda", 0)), call.make(Maker("cuda", 1))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            execute(call, static, kernels)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = execute(call, static, kernels)
    for key, value in fresh.items():
        static[key].copy_(value)
    for _ in range(2):  # what a launch leaves behind must not matter to the next
        for t in out:
            t.zero_()
        graph.replay()
        assert equal(out, execute(call, fresh, kernels))


def same_bits(kernels: str, name: str, runs: int) -> bool:
    call = CALLS[name]
    inputs = call.make(Maker("cuda", size=LARGE))
    first = execute(call, inputs, kernels)
    return all(equal(first, execute(call, inputs, kernels)) for _ in range(runs))


@each(TESTS["test_same_bits"])
def test_same_bits(kernels: str, name: str) -> None:
    assert same_bits(kernels, name, 100)


@each(TESTS["test_the_rest_gives_the_same_bits_too"])
def test_the_rest_gives_the_same_bits_too(kernels: str, name: str) -> None:
    assert same_bits(kernels, name, 10)


@pytest.mark.parametrize(("rows", "vocab"), [(1031, FLAGSHIP), (1031, WIDE), (9001, NARROW)])
@pytest.mark.parametrize("kernels", BACKENDS)
def test_more_rows_than_blocks(kernels: str, rows: int, vocab: int) -> None:
    """Persistent grids take many turns: rows from all of them against float64."""
    t = CALLS[f"logits_policy_loss_{vocab}"].make(Maker("cuda", size=(rows, 1)))
    at = torch.tensor([0, 1, 2, 131, 132, 133, rows // 2, rows // 2 + 1, rows - 2, rows - 1], device="cuda")
    few = {name: x[at] for name, x in t.items()}

    def step(x: torch.Tensor, t: Inputs, backend: str) -> tuple[torch.Tensor, ...]:
        leaf = x.detach().requires_grad_()
        mask = t["mask"] & (t["labels"] != -100)
        options = {"entropy_coef": 0.01, "reduction": "token-sum", "backend": backend}
        out = fastrlhf.logits_policy_loss(leaf, t["labels"], t["old"], t["adv"], mask, **options)
        return out.logprobs, out.entropy, torch.autograd.grad(out.loss, leaf)[0]

    ours = [x[at] for x in step(t["logits"], t, kernels)]
    oracle, plain = step(few["logits"].double(), few, "reference"), step(few["logits"].float(), few, "reference")
    for mine, exact, other in zip(ours[:2], oracle, plain):
        assert_accurate(mine, exact, other)
    assert_gradient_accurate(ours[2], oracle[2], plain[2].bfloat16())


@each(TESTS["test_rows_of_any_batch"])
def test_rows_of_any_batch(kernels: str, name: str) -> None:
    call = CALLS[name]
    inputs = call.make(Maker("cuda", size=LARGE))
    whole = execute(call, inputs, kernels)
    for rows in (slice(0, 1), slice(3, 4), slice(7, 140), slice(1, None)):
        part = execute(call, {k: t[rows] for k, t in inputs.items()}, kernels)
        assert equal(part, [t[rows] for t in whole]), rows


@each(TESTS["test_graph"])
def test_nothing_waits_for_the_device(kernels: str, name: str) -> None:
    call = CALLS[name]
    inputs = call.make(Maker("cuda"))
    execute(call, inputs, kernels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        execute(call, inputs, kernels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each(TESTS["test_graph"])
def test_the_current_stream_is_used(kernels: str, name: str) -> None:
    """Inputs that arrive late on a stream of their own; a kernel on another stream would see what was there before."""
    call = CALLS[name]
    right, late = call.make(Maker("cuda", 1)), call.make(Maker("cuda", 0))
    expected = execute(call, right, kernels)
    execute(call, late, kernels)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for key, value in right.items():
            late[key].copy_(value)
        out = execute(call, late, kernels)
    stream.synchronize()
    assert equal(out, expected)


@pytest.mark.parametrize("kernels", BACKENDS)
def test_two_streams_at_once(kernels: str) -> None:
    """Launches of two streams, which may share no scratch memory."""
    call = CALLS["policy_loss_ppo_token-mean"]
    inputs = [call.make(Maker("cuda", seed, size=LARGE)) for seed in (0, 1)]
    expected = [execute(call, x, kernels) for x in inputs]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(30):
        out: list[list[torch.Tensor]] = []
        for stream, x in zip(streams, inputs):
            with torch.cuda.stream(stream):
                out.append(execute(call, x, kernels))
        torch.cuda.synchronize()
        assert all(equal(a, b) for a, b in zip(out, expected))


@pytest.mark.parametrize("kernels", BACKENDS)
def test_inputs_on_two_devices_are_refused(kernels: str) -> None:
    logits = torch.randn(3, 7, device="cuda")
    with pytest.raises(ValueError, match="labels: expected on logits's device"):
        fastrlhf.logprobs(logits, torch.zeros(3, dtype=torch.long, device="cpu"), backend=kernels)
    with pytest.raises(ValueError, match="mask: expected on"):
        fastrlhf.policy_loss(logits, logits, logits, torch.ones(3, 7, device="cpu"), backend=kernels)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@each(cases())
def test_a_device_that_is_not_the_current_one(kernels: str, name: str) -> None:
    call = CALLS[name]
    out = execute(call, call.make(Maker("cuda:1")), kernels)
    assert equal([t.cpu() for t in out], [t.cpu() for t in execute(call, call.make(Maker("cuda:0")), kernels)])


LOGITS = (64, 128256)


def large() -> Inputs:
    x = torch.randn(LOGITS, device="cuda", dtype=torch.bfloat16)
    return {"x": x, "y": torch.randn_like(x), "labels": torch.randint(0, LOGITS[1], LOGITS[:1], device="cuda")}


def extra_bytes(run) -> int:
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = run()
    torch.cuda.synchronize()
    del out
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("kernels", BACKENDS)
def test_nothing_as_large_as_the_logits_is_allocated(kernels: str) -> None:
    t = large()
    allowed = t["x"].nbytes // 8

    def step() -> torch.Tensor:
        leaf = t["x"].detach().requires_grad_()
        out = fastrlhf.logprobs(leaf, t["labels"], entropy=True, backend=kernels)
        return torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), leaf)[0]

    assert extra_bytes(lambda: fastrlhf.logprobs(t["x"], t["labels"], entropy=True, backend=kernels)) < allowed
    assert extra_bytes(step) < t["x"].nbytes + allowed  # the gradient itself
    if kernels == "triton":
        assert extra_bytes(lambda: fastrlhf.kl_full(t["x"], t["y"], backend=kernels)) < allowed
        assert extra_bytes(lambda: fastrlhf.sample(t["x"], seed=0, backend=kernels)) < allowed


def launches(run) -> list[str]:
    """Names of those that a call launches."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    on_device = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in on_device if not name.startswith(("Memcpy", "Memset", "Activity Buffer"))]


@pytest.mark.parametrize("kernels", [backend for backend, _ in TESTS["test_one_launch"]])
def test_one_launch(kernels: str) -> None:
    """Policy loss: loss, gradient and statistics in one launch forward, one backward."""
    lp, old, adv = (torch.randn(64, 1024, device="cuda") for _ in range(3))
    mask, upstream = lp > -0.5, torch.ones((), device="cuda")
    leaf = lp.requires_grad_()

    def forward() -> torch.Tensor:
        return fastrlhf.policy_loss(leaf, old, adv, mask, backend=kernels).loss

    torch.autograd.grad(forward(), leaf, upstream)
    if not launches(lambda: torch.ones(5, device="cuda") + 1):
        pytest.skip("the profiler sees no kernels here")
    assert len(launches(forward)) == 1, launches(forward)
    loss = forward()
    found = launches(lambda: torch.autograd.grad(loss, leaf, upstream, retain_graph=True))
    assert len(found) == 1, found
