"""What the vocab-parallel head sends: 16 bytes a row and rank forward, nothing backward."""

from __future__ import annotations

import torch
import torch.distributed as dist
from fastrlhf.models import Decoder, DecoderConfig, token_logprobs
from fastrlhf.parallel import ParallelGroups
from torch.utils._python_dispatch import TorchDispatchMode

from .processes import spawn
from .test_groups import CONFIG

ROWS = 37


class Sent(TorchDispatchMode):
    """The operations of c10d and the bytes that each puts in, as torch dispatches them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "c10d":
            leaves = torch.utils._pytree.tree_leaves(args[1] if "allgather" in func.name() else args[0])
            self.calls.append((func.name(), sum(t.nbytes for t in leaves if isinstance(t, torch.Tensor))))
        return func(*args, **(kwargs or {}))


def head(rank: int) -> dict[str, object]:
    model = Decoder(DecoderConfig.from_hf(CONFIG), groups=ParallelGroups.create(tp=2)).initialize(0)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, 32, generator=generator)
    labels = torch.randint(64, (ROWS,), generator=generator)
    weight = model.head.weight
    out = {}
    with Sent() as sent:
        logits = model.logits(hidden)  # hidden needs no gradient here: only what the head itself sends is counted
        from fastrlhf import ops

        parallel = ops.VocabParallel(model.groups.tp.group, model.head.first, model.head.first + model.head.rows, 64)
        found = ops.logprobs(logits, labels, entropy=True, vocab_parallel=parallel)
        out["forward"], sent.calls = sent.calls, []
        (found.logprobs.sum() + found.entropy.sum()).backward()
        out["backward"], sent.calls = sent.calls, []
        fused = token_logprobs(model, hidden, labels, entropy=True)
        out["fused forward"], sent.calls = sent.calls, []
        assert fused.entropy is not None
        (fused.logprobs.sum() + fused.entropy.sum()).backward()
        out["fused backward"], sent.calls = sent.calls, []
        dist.all_reduce(torch.zeros(3))
        out["is counted"] = sent.calls[-1]
    assert weight.grad is not None
    return out


def test_sixteen_bytes_a_row_and_nothing_back() -> None:
    for found in spawn(2, head):
        assert [size for _, size in found["forward"]] == [16 * ROWS], found
        assert found["backward"] == []
        assert [size for _, size in found["fused forward"]] == [16 * ROWS], found
        assert found["fused backward"] == []
        assert found["is counted"][1] == 12
