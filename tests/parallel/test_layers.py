"""A decoder sharded over two processes is the decoder in one: logits, gradients, and what it saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fastrlhf.models import Decoder, DecoderConfig, Packed, add_lora, load_decoder, save_decoder, token_logprobs
from fastrlhf.parallel import ParallelGroups

pytest.importorskip("safetensors")
CONFIG = {
    "model_type": "qwen2", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
}  # fmt: skip
SEQUENCES = [[5, 9, 63, 0, 31], [32, 2, 7]]


def step(model: Decoder) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, pack = Packed.of(SEQUENCES)
    out = token_logprobs(model, model(tokens, pack), tokens.roll(-1), entropy=True)
    out.logprobs.sum().backward()
    assert out.entropy is not None
    return out.logprobs.detach(), out.entropy.detach()


def worker(rank: int, directory: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2)
    groups = ParallelGroups.create(tp=2)
    assert (groups.tp.size, groups.tp.rank, groups.dp.size, groups.pp.size) == (2, rank, 1, 1)
    model = load_decoder(f"{directory}/whole", groups=groups)
    logprobs, entropy = step(model)
    result: dict[str, Any] = {"logprobs": logprobs, "entropy": entropy}
    result["grads"] = {n: p.grad for n, p in model.named_parameters()}
    save_decoder(model, f"{directory}/again")
    same = Decoder(model.config, groups=groups).initialize(7)
    result["initial"] = same.layers[1].mlp.gate_up_proj.weight.detach()
    with pytest.raises(ValueError, match=r"model\.lora\.rank: not yet with tensor parallelism, expected 0 with tp=2"):
        add_lora(same, rank=2)
    torch.save(result, f"{directory}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_are_one(tmp_path: Path) -> None:
    whole = Decoder(DecoderConfig.from_hf(CONFIG)).initialize(7)
    save_decoder(whole, tmp_path / "whole")
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    logprobs, entropy = step(whole)
    shards = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2)]
    for r in range(2):
        torch.testing.assert_close(shards[r]["logprobs"], logprobs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(shards[r]["entropy"], entropy, atol=1e-5, rtol=1e-5)
    grad = {n: p.grad for n, p in whole.named_parameters()}

    def of(name: str) -> list[torch.Tensor]:
        return [s["grads"][name] for s in shards]

    def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)

    same(torch.cat(of("lm_head.weight")), grad["lm_head.weight"])
    same(torch.cat(of("embed_tokens.weight")), grad["embed_tokens.weight"])
    same(torch.cat(of("layers.0.mlp.down_proj.weight"), 1), grad["layers.0.mlp.down_proj.weight"])
    same(of("layers.0.input_layernorm.weight")[1], grad["layers.0.input_layernorm.weight"])
    gate = [g[:24] for g in of("layers.1.mlp.gate_up_proj.weight")]
    same(torch.cat(gate), grad["layers.1.mlp.gate_up_proj.weight"][:48])
    initial = [s["initial"] for s in shards]
    assert torch.equal(torch.cat([i[24:] for i in initial]), whole.layers[1].mlp.gate_up_proj.weight[48:])
    again = load_decoder(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


def test_one_process_is_the_grid_of_ones() -> None:
    assert ParallelGroups.create() == ParallelGroups()
    with pytest.raises(ValueError, match="2 x 1 does not divide the 1 process"):
        ParallelGroups.create(tp=2)
    with pytest.raises(ValueError, match="expected sizes >= 1, got tp=0"):
        ParallelGroups.create(tp=0)
