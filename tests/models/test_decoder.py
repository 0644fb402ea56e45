"""Logits equal transformers', packed equals padded, directories go both ways, LoRA is exact when off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fastrlhf.models import (
    Decoder,
    DecoderConfig,
    Packed,
    ScalarModel,
    adapters_off,
    add_lora,
    load_decoder,
    load_scalar_model,
    save_decoder,
    save_scalar_model,
    token_logprobs,
)  # fmt: skip

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
FAMILIES = {
    "llama": ("Llama", {}),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "llama3": ("Llama", {"rope_scaling": LLAMA3, "rope_theta": 5e5}),
    "llama-yarn": ("Llama", {"rope_scaling": YARN}),
    "llama-head-dim": ("Llama", {"head_dim": 16}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-mha": ("Llama", {"num_key_value_heads": 6}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-bias": ("Qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
}


def theirs(family: str) -> Any:
    name, more = FAMILIES[family]
    torch.manual_seed(1)
    config = getattr(transformers, name + "Config")(**{**SMALL, **more})
    model = getattr(transformers, name + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n.endswith("bias") or "norm" in n:
                p.add_(torch.randn_like(p) * 0.2)
    return model


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Decoder]:
    model = theirs(request.param)
    model.save_pretrained(tmp_path / "hf")
    return model, load_decoder(tmp_path / "hf")


def sequences(lengths: tuple[int, ...] = (40, 3, 17, 1)) -> list[list[int]]:
    return [torch.randint(0, 97, (n,)).tolist() for n in lengths]


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_packed_logits_equal_transformers(pair: tuple[Any, Decoder]) -> None:
    hf, model = pair
    given = sequences()
    tokens, pack = Packed.of(given)
    logits = model.logits(model(tokens, pack))
    close(logits, torch.cat([hf(torch.tensor([s])).logits[0] for s in given]))


@torch.no_grad()
def test_a_saved_directory_loads_in_transformers(pair: tuple[Any, Decoder], tmp_path: Path) -> None:
    hf, model = pair
    for bytes_, shards in ((10**9, 1), (20_000, 2)):
        out = tmp_path / f"ours{bytes_}"
        save_decoder(model, out, max_shard_bytes=bytes_)
        assert len(list(out.glob("*.safetensors"))) >= shards
        again = transformers.AutoModelForCausalLM.from_pretrained(out)
        ids = torch.tensor(sequences((25,)))
        assert torch.equal(hf(ids).logits, again(ids).logits)
        ours = load_decoder(out)
        tokens, pack = Packed.of(ids.tolist())
        assert torch.equal(ours.logits(ours(tokens, pack)), model.logits(model(tokens, pack)))


def test_gradients_equal_transformers(pair: tuple[Any, Decoder]) -> None:
    hf, model = pair
    given = sequences((12, 5))
    tokens, pack = Packed.of(given)
    model.logits(model(tokens, pack)).logsumexp(-1).sum().backward()
    sum(hf(torch.tensor([s])).logits.logsumexp(-1).sum() for s in given).backward()
    grads = {n: p.grad for n, p in hf.named_parameters()}
    for n in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"):
        close(dict(model.named_parameters())[n.removeprefix("model.")].grad, grads[n])
    qkv = model.layers[0].self_attn.qkv_proj
    close(qkv.weight.grad[qkv.rows("k_proj")], grads["model.layers.0.self_attn.k_proj.weight"])


@torch.no_grad()
def test_a_sequence_alone_is_the_sequence_in_a_pack() -> None:
    model = Decoder(DecoderConfig.from_hf({"model_type": "llama", **SMALL})).initialize(0)
    given = sequences((33, 8, 21))
    tokens, pack = Packed.of(given)
    whole = model.logits(model(tokens, pack))
    at = 0
    for s in given:
        tokens, pack = Packed.of([s])
        torch.testing.assert_close(model.logits(model(tokens, pack)), whole[at : at + len(s)], atol=1e-5, rtol=1e-5)
        at += len(s)


def test_activation_checkpointing_changes_no_gradient() -> None:
    grads = []
    for on in (False, True):
        model = Decoder(DecoderConfig.from_hf({"model_type": "qwen3", **SMALL})).initialize(0)
        model.checkpoint_activations = on
        torch.manual_seed(3)
        tokens, pack = Packed.of(sequences((9, 4)))
        token_logprobs(model, model(tokens, pack), tokens.roll(-1)).logprobs.sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_lora_off_is_the_base_to_the_bit_and_on_it_is_not(tmp_path: Path) -> None:
    config = DecoderConfig.from_hf({"model_type": "qwen2", **SMALL})
    model = Decoder(config).initialize(0)
    tokens, pack = Packed.of(sequences((9, 4)))
    with torch.no_grad():
        base = model.logits(model(tokens, pack))
    parameters = add_lora(model, rank=4, targets=("q_proj", "v_proj", "o_proj", "up_proj"))
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    with torch.no_grad():
        assert torch.equal(model.logits(model(tokens, pack)), base)  # B is 0
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    token_logprobs(model, model(tokens, pack), tokens).logprobs.mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    token_logprobs(model, model(tokens, pack), tokens).logprobs.mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)
    optimizer.step()
    with torch.no_grad():
        changed = model.logits(model(tokens, pack))
        assert (changed - base).abs().max() > 1e-3
        with adapters_off(model):
            assert torch.equal(model.logits(model(tokens, pack)), base)
        save_decoder(model, tmp_path)
        merged = load_decoder(tmp_path)
        close(merged.logits(merged(tokens, pack)), changed)


def test_lora_says_what_is_wrong() -> None:
    model = Decoder(DecoderConfig.from_hf({"model_type": "llama", **SMALL}))
    with pytest.raises(ValueError, match=r"lora targets: .*'wq'"):
        add_lora(model, rank=4, targets=("wq",))
    with pytest.raises(ValueError, match="lora rank: expected >= 1, got 0"):
        add_lora(model, rank=0)


@torch.no_grad()
def test_a_reward_model_goes_to_transformers_and_back(tmp_path: Path) -> None:
    decoder = Decoder(DecoderConfig.from_hf({"model_type": "llama", **SMALL, "pad_token_id": 0}), head=False).initialize(0)
    model = ScalarModel(decoder, mean=0.5, std=2.0).initialize_head(1)
    save_scalar_model(model, tmp_path)
    hf = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    given = [[1 + t % 96 for t in s] for s in sequences((9, 4))]
    tokens, pack = Packed.of(given)
    last = pack.cu_seqlens[1:] - 1
    close(model(tokens, pack)[last], torch.cat([hf(torch.tensor([s])).logits[0] for s in given]))
    again = load_scalar_model(tmp_path)
    assert torch.equal(again(tokens, pack), model(tokens, pack))
    assert (again.mean, again.std) == (0.5, 2.0)
    assert torch.equal(again.standardized(torch.tensor([2.5])), torch.tensor([1.0]))


def test_a_scalar_head_over_a_language_model_starts_near_zero(tmp_path: Path) -> None:
    save_decoder(Decoder(DecoderConfig.from_hf({"model_type": "llama", **SMALL})).initialize(0), tmp_path)
    a, b = load_scalar_model(tmp_path, seed=1), load_scalar_model(tmp_path, seed=1)
    assert torch.equal(a.score, b.score) and 0 < a.score.abs().max() < 0.2


def test_what_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load_decoder(tmp_path)
    config = {"model_type": "llama", **SMALL}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(ValueError, match=r"config\.json: model_type: .*'gpt2'"):
        load_decoder(tmp_path)
    save_decoder(Decoder(DecoderConfig.from_hf(config)).initialize(0), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 88}))
    with pytest.raises(ValueError, match=r"down_proj\.weight: expected shape \(48, 88\), the checkpoint has \(48, 80\)"):
        load_decoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(ValueError, match=r"weights are missing, the first 'model\.layers\.3"):
        load_decoder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="only safetensors are read"):
        load_decoder(tmp_path)
