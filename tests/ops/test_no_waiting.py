"""Nothing in an op's way to a GPU kernel reads a tensor's value or copies a number to the device, both of which wait for it.
The ops run on CPU tensors, Triton's launches recorded and CUDA's sources as built for the host; tests/gpu has the same on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import fastrlhf
import pytest
import torch
import torch.distributed as dist
from fastrlhf.kernels.common import launch
from fastrlhf.kernels.policy_loss.reference import REDUCTIONS
from fastrlhf.ops import backend as backends
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.gpu.calls import CALLS, Maker, execute, names

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu shows it on the device")


class NothingRead(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
        assert func.name() not in waits, f"{func.name()} waits for the device"
        counted = func.name() != "aten::repeat_interleave.Tensor" or (kwargs or {}).get("output_size") is not None
        assert counted, "repeat_interleave without output_size waits for the device"
        return func(*args, **(kwargs or {}))


class NothingCopied(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.tensor, torch.as_tensor), f"{func.__name__} copies from the host"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """cuda where the tests run on it, else triton."""
    if request.config.getoption("--kernels") == "cuda":
        yield "cuda"
        return
    pytest.importorskip("triton")
    monkeypatch.setattr(backends, "_recorded", True)
    backends._obstacle.cache_clear()
    with launch.recording(lambda *_: None):
        yield "triton"
    backends._obstacle.cache_clear()


@pytest.mark.parametrize("name", [n for n in CALLS if CALLS[n].in_graph])
def test_nothing_waits(kernels, name):
    if name not in names(kernels):
        pytest.skip("this op has no CUDA kernel")
    inputs = CALLS[name].make(Maker("cpu"))
    with NothingRead(), NothingCopied():
        execute(CALLS[name], inputs, kernels)


def test_nothing_waits_for_a_count_over_a_group(kernels, tmp_path):
    t = Maker("cpu").packed("lp", "old", "adv")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with NothingRead(), NothingCopied():
            for reduction in REDUCTIONS:
                options = {"reduction": reduction, "cu_seqlens": t["cu"], "group": dist.group.WORLD, "backend": kernels}
                fastrlhf.policy_loss(t["lp"], t["old"], t["adv"], t["mask"], **options)
    finally:
        dist.destroy_process_group()


def test_a_pairs_baseline_and_denominator_stay_on_the_device(kernels):
    if kernels == "cuda":
        pytest.skip("this op has no CUDA kernel")
    pairs, baseline, over = torch.randn(4, 9), torch.rand(()), torch.full((), 9.0)
    with NothingRead(), NothingCopied():
        fastrlhf.preference_loss(*pairs, kind="kto", kl_baseline=baseline, denominator=over, backend=kernels)


@pytest.mark.parametrize("over", [7.0, torch.full((), 7.0, device="cpu")], ids=["number", "tensor"])
def test_a_given_denominator(kernels, over):
    t = CALLS["logits_policy_loss_1000"].make(Maker("cpu"))
    x = t["logits"].requires_grad_()
    with NothingRead(), NothingCopied():
        fastrlhf.logits_policy_loss(x, t["labels"], t["old"], t["adv"], t["mask"], denominator=over, backend=kernels)
