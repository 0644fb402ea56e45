"""Across ranks, on gloo: vocab-parallel log-probs, group statistics and denominators against the undivided computation."""

from __future__ import annotations

import os
import socket

import fastrlhf
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fastrlhf import VocabParallel
from fastrlhf.kernels.logprobs import reference

from tests.conftest import use_kernels
from tests.oracle import INTERPRETED

ROWS, VOCAB = 5 if INTERPRETED else 13, 2400
CASES = [({}, None), ({"temperature": 0.6, "softcap": 9.0}, None), ({}, "mask"), ({}, "csr")]


def _worker(rank: int, world: int, port: int, kernels: str) -> None:
    use_kernels(kernels)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        for check in (vocab_parallel, fused_head, unequal_shards, distillation, statistics, losses):
            torch.manual_seed(0)
            check(rank, world, kernels)
    finally:
        dist.destroy_process_group()


def spawn(world: int, kernels: str) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_worker, (world, port, kernels), nprocs=world, join=True)


def backends(kernels: str) -> tuple[str, ...]:
    return ("cpu", "reference") if kernels == "cpu" else (kernels,)


def same_on_all_ranks(t: torch.Tensor) -> None:
    parts = [torch.empty_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, t.contiguous())
    assert all(torch.equal(p.nan_to_num(7, 8, 9), parts[0].nan_to_num(7, 8, 9)) for p in parts)


def vocab_parallel(rank: int, world: int, kernels: str) -> None:
    shard = VOCAB // world
    mine = slice(rank * shard, (rank + 1) * shard)
    for i, kind in enumerate(("normal", "far", "masked")):
        logits = torch.randn(ROWS, VOCAB) * 2
        if kind == "far":
            logits += torch.arange(world).repeat_interleave(shard) * 300.0  # all the mass on one rank
        if kind == "masked":
            logits[:, : VOCAB // 2] = -torch.inf
            logits[3] = -torch.inf
        labels = torch.randint(0, VOCAB, (ROWS,))
        labels[4] = -100
        keep = torch.rand(ROWS, VOCAB) < 0.3
        csr = (torch.cat([torch.zeros(1, dtype=torch.long), keep.sum(-1).cumsum(0)]), keep.nonzero()[:, 1])
        for backend in backends(kernels):
            for options, kept in CASES[i % 2 :: 2] if INTERPRETED and world > 2 else CASES:
                oracle = reference.logprobs(logits.double(), labels, kept=None if kept is None else keep, **options)
                x = logits[:, mine].clone().requires_grad_()
                local = {"mask": keep[:, mine].contiguous(), "csr": csr, None: None}[kept]
                group = dist.group.WORLD if kept != "csr" else VocabParallel(dist.group.WORLD, mine.start, mine.stop, VOCAB)
                ours = fastrlhf.logprobs(
                    x, labels, entropy=True, lse=True, vocab_parallel=group, kept=local, backend=backend, **options
                )
                for a, b in zip(ours, oracle, strict=True):
                    torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=4e-6, equal_nan=True)
                    same_on_all_ranks(a.detach())
                if kind == "masked":
                    continue
                whole = logits.double().requires_grad_()
                out = reference.logprobs(whole, labels, kept=None if kept is None else keep, **options)
                same = (torch.Generator(torch.get_default_device()).manual_seed(i) for i in range(3))
                upstream = [torch.randn(ROWS, generator=g) for g in same]
                torch.autograd.backward(out, [u.double() for u in upstream])
                torch.autograd.backward(ours, upstream)
                torch.testing.assert_close(x.grad.double(), whole.grad[:, mine], rtol=1e-4, atol=2e-6)


def fused_head(rank: int, world: int, kernels: str) -> None:
    """Shards of the head's weight: the same bits everywhere, the unsplit result, shares that add up to its gradients."""
    width, vocab = 24, 960
    shard = vocab // world
    mine = slice(rank * shard, (rank + 1) * shard)
    hidden, weight, bias = torch.randn(ROWS, width), torch.randn(vocab, width) / 2, torch.randn(vocab)
    labels = torch.randint(0, vocab, (ROWS,))
    labels[2] = -100
    keep = torch.rand(ROWS, vocab) < 0.3
    csr = (torch.cat([torch.zeros(1, dtype=torch.long), keep.sum(-1).cumsum(0)]), keep.nonzero()[:, 1])
    tokens = (torch.randn(1, ROWS) - 5, torch.randn(1, ROWS), torch.rand(1, ROWS) < 0.8)
    for backend in backends(kernels):
        for options, kept in CASES[:: 2 if INTERPRETED else 1]:
            whole = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
            local = [t.clone().requires_grad_() for t in (hidden, weight[mine], bias[mine])]
            sets = {"mask": (keep, keep[:, mine].contiguous()), "csr": (csr, csr), None: (None, None)}[kept]
            group = VocabParallel(dist.group.WORLD, mine.start, mine.stop, vocab)
            exact = fastrlhf.linear_logprobs(
                whole[0], whole[1], labels, bias=whole[2], entropy=True, lse=True, kept=sets[0], backend=backend, **options
            )
            ours = fastrlhf.linear_logprobs(
                local[0], local[1], labels, bias=local[2], entropy=True, lse=True, kept=sets[1], vocab_parallel=group,
                backend=backend, **options,
            )  # fmt: skip
            for a, b in zip(ours, exact, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-6)
                same_on_all_ranks(a.detach())
            for out in (ours, exact):
                (out.logprobs.sum() + 0.1 * out.entropy.sum()).backward()
            _shares_add_up(local, whole, mine)

            if kept is not None:
                continue
            for t in (*whole, *local):
                t.grad = None
            losses_ = []
            for (h, w, b), parallel in ((local, group), (whole, None)):
                out = fastrlhf.linear_policy_loss(
                    h[None], w, labels[None], *tokens, bias=b, vocab_parallel=parallel, backend=backend, **options
                )
                out.loss.backward()
                losses_.append(out.loss.detach())
            torch.testing.assert_close(*losses_, rtol=1e-6, atol=1e-6)
            same_on_all_ranks(losses_[0])
            _shares_add_up(local, whole, mine)


def unequal_shards(rank: int, world: int, kernels: str) -> None:
    """Blocks of rows are the same on every rank, whatever each rank's columns would let be."""
    width, vocab, rows = 8, 960, 150
    cuts = [0, *(vocab * 3 // 4 + 10 * i for i in range(world - 1)), vocab]
    mine = slice(cuts[rank], cuts[rank + 1])
    hidden, weight, labels = torch.randn(rows, width), torch.randn(vocab, width) / 2, torch.randint(0, vocab, (rows,))
    group, workspace = VocabParallel(dist.group.WORLD, mine.start, mine.stop, vocab), 1 << 17
    for backend in (b for b in backends(kernels) if b != "reference"):
        whole = [t.clone().requires_grad_() for t in (hidden, weight)]
        local = [t.clone().requires_grad_() for t in (hidden, weight[mine])]
        for (h, w), parallel in ((whole, None), (local, group)):
            out = fastrlhf.linear_policy_loss(
                h, w, labels, torch.full((rows,), -5.0), torch.ones(rows), None, vocab_parallel=parallel,
                workspace_bytes=workspace, backend=backend,
            )  # fmt: skip
            out.loss.backward()
        same_on_all_ranks(out.loss.detach())
        dist.all_reduce(local[0].grad)
        for a, b in zip(local, (whole[0].grad, whole[1].grad[mine]), strict=True):
            torch.testing.assert_close(a.grad, b, rtol=1e-4, atol=1e-6)


def _shares_add_up(local: list[torch.Tensor], whole: list[torch.Tensor], mine: slice) -> None:
    dist.all_reduce(local[0].grad)
    for a, b in zip(local, (whole[0].grad, whole[1].grad[mine], whole[2].grad[mine]), strict=True):
        torch.testing.assert_close(a.grad, b, rtol=1e-4, atol=1e-6)


def distillation(rank: int, world: int, kernels: str) -> None:
    shard = VOCAB // world
    mine = slice(rank * shard, (rank + 1) * shard)
    logits, teacher = torch.randn(ROWS, VOCAB) * 2, torch.randn(ROWS, VOCAB)
    logits[0] = -torch.inf
    logits[0, :7] = 1.0
    teacher, ids = teacher.topk(7)
    ids[0] = torch.arange(7)
    mask = torch.arange(ROWS) % 3 != 1
    having = backends(kernels) if kernels != "cuda" else ("reference",)
    for backend in having:
        for direction in ("forward", "reverse"):
            whole, part = logits.clone().requires_grad_(), logits[:, mine].clone().requires_grad_()
            options = {"direction": direction, "temperature": 0.8, "backend": backend}
            full = fastrlhf.topk_distill_loss(whole, teacher, ids, mask, **options)
            full.loss.backward()
            for parallel in (dist.group.WORLD, fastrlhf.VocabParallel(dist.group.WORLD, mine.start, mine.stop, VOCAB)):
                part.grad = None
                out = fastrlhf.topk_distill_loss(part, teacher, ids, mask, vocab_parallel=parallel, **options)
                out.loss.backward()
                for a, b in ((out.loss, full.loss), (out.losses, full.losses), (out.stats.values, full.stats.values)):
                    assert torch.equal(a, b)
                    same_on_all_ranks(a.detach())
                assert torch.equal(part.grad, whole.grad[:, mine])
    rows = slice(rank * (ROWS // world), (rank + 1) * (ROWS // world))
    inputs, ran = (logits, teacher, ids, mask), slice(0, ROWS // world * world)
    share = fastrlhf.topk_distill_loss(*(t[rows] for t in inputs), group=dist.group.WORLD, backend=having[0]).loss
    dist.all_reduce(share)
    torch.testing.assert_close(share, fastrlhf.topk_distill_loss(*(t[ran] for t in inputs), backend=having[0]).loss)


def statistics(rank: int, world: int, kernels: str) -> None:
    everything, counted = torch.randn(world * 5, 70) + 1e3, torch.rand(world * 5, 70) < 0.4
    x, mask = everything[rank * 5 : rank * 5 + 5], counted[rank * 5 : rank * 5 + 5]
    if rank == 0:
        assert counted[:5].any()
    group = dist.group.WORLD
    exact = everything.double()[counted]
    torch.testing.assert_close(fastrlhf.masked_mean(x, mask, group=group).double(), exact.mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(fastrlhf.masked_var(x, mask, group=group).double(), exact.var(), rtol=1e-5, atol=0)
    white = fastrlhf.whiten(x, mask, group=group)
    expected = ((x.double() - exact.mean()) / exact.std())[mask]
    torch.testing.assert_close(white[mask].double(), expected, rtol=1e-4, atol=2e-4)
    rewards, values = torch.randn(5, 70), torch.randn(5, 70)
    local = fastrlhf.gae(rewards, values, mask)[0]
    all_a = [torch.empty_like(local) for _ in range(world)]
    dist.all_gather(all_a, local)
    whole = fastrlhf.whiten(torch.cat(all_a), counted)
    mine = fastrlhf.gae(rewards, values, mask, whiten=True, group=group)[0]
    torch.testing.assert_close(mine, whole[rank * 5 : rank * 5 + 5], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="group"):
        fastrlhf.whiten(x.clone().requires_grad_(), mask, group=group)


def losses(rank: int, world: int, kernels: str) -> None:
    """Ranks' losses and gradients add up to the full batch's."""
    n = world * 4
    lp, old, A, mask = torch.randn(n, 30), torch.randn(n, 30), torch.randn(n, 30), torch.rand(n, 30) < 0.6
    mask[1] = False
    mine = slice(rank * 4, rank * 4 + 4)
    for reduction in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"):
        for backend in backends(kernels):
            full = fastrlhf.policy_loss(lp, old, A, mask, reduction=reduction, ratio_clamp=1.0).loss
            part = fastrlhf.policy_loss(
                lp[mine],
                old[mine],
                A[mine],
                mask[mine],
                reduction=reduction,
                ratio_clamp=1.0,
                group=dist.group.WORLD,
                backend=backend,
            ).loss
            dist.all_reduce(part)
            torch.testing.assert_close(part, full, rtol=1e-5, atol=1e-6)
            value = fastrlhf.value_loss(
                lp[mine], old[mine], A[mine], mask[mine], reduction=reduction, group=dist.group.WORLD
            ).loss
            dist.all_reduce(value)
            torch.testing.assert_close(
                value, fastrlhf.value_loss(lp, old, A, mask, reduction=reduction).loss, rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("world", [2, 4])
def test_across_ranks(request, world):
    """All checks in the same processes, which take seconds to start."""
    spawn(world, request.config.getoption("--kernels"))
