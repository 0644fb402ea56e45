"""The Hugging Face tensors of a model, from its config.json, grouped as trainers and engines shard and fuse them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .catalogue import PlanError


@dataclass(frozen=True)
class Part:
    """One tensor, (rows, cols); a vector has one column."""

    name: str
    rows: int
    cols: int = 1


@dataclass(frozen=True)
class Copied:
    """Every rank of a stage has it whole: norms, routers, biases of row-parallel layers."""

    part: Part


@dataclass(frozen=True)
class RowSharded:
    """Rows are shared out, and parts may be fused under `name`: gate and up."""

    name: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class ColSharded:
    """Columns are shared out: what writes to the residual stream."""

    part: Part


@dataclass(frozen=True)
class Attention:
    """Query, key and value, `heads` and `kv_heads` heads of `dim` rows each, under `name`."""

    name: str
    parts: tuple[Part, Part, Part]
    heads: int
    kv_heads: int
    dim: int


@dataclass(frozen=True)
class Experts:
    """`count` experts with gate, up (rows shared out) and down (columns), by {}-patterns of their names."""

    name: str
    count: int
    gate: str
    up: str
    down: str
    inner: int
    hidden: int


Module = Copied | RowSharded | ColSharded | Attention | Experts


@dataclass(frozen=True)
class Model:
    """`head` is None where it is tied to the embedding."""

    embedding: Part
    layers: tuple[tuple[Module, ...], ...]
    norm: Part
    head: Part | None
    dtype: str = "bfloat16"
    source: Mapping[str, Any] = field(default_factory=dict)


FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3",
)  # fmt: skip


def model_of(config: Mapping[str, Any]) -> Model:
    """
    Raises:
        PlanError: a model_type that is not known, or a key that is missing.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise PlanError(f"model_type: expected one of {', '.join(FAMILIES)}, got {kind!r}")
    try:
        layers = tuple(_layer(config, i) for i in range(config["num_hidden_layers"]))
        vocab, hidden = config["vocab_size"], config["hidden_size"]
    except KeyError as missing:
        raise PlanError(f"config.json: {missing} is missing") from None
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    return Model(
        Part("model.embed_tokens.weight", vocab, hidden),
        layers,
        Part("model.norm.weight", hidden),
        None if config.get("tie_word_embeddings", False) else Part("lm_head.weight", vocab, hidden),
        dtype,
        config,
    )


def _layer(config: Mapping[str, Any], i: int) -> tuple[Module, ...]:
    prefix, hidden = f"model.layers.{i}.", config["hidden_size"]
    deepseek = str(config["model_type"]).startswith("deepseek")
    return (
        Copied(Part(prefix + "input_layernorm.weight", hidden)),
        *(_latent_attention(config, prefix + "self_attn.") if deepseek else _attention(config, prefix + "self_attn.")),
        Copied(Part(prefix + "post_attention_layernorm.weight", hidden)),
        *_feed_forward(config, i, prefix),
    )


def _attention(config: Mapping[str, Any], prefix: str) -> list[Module]:
    kind, hidden, heads = config["model_type"], config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    dim = config.get("head_dim") or (128 if kind in ("qwen3", "qwen3_moe") else hidden // heads)
    biased = kind in ("qwen2", "qwen2_moe") or bool(config.get("attention_bias", False))

    def fused(what: str, cols: int) -> Attention:
        q, k, v = (Part(f"{prefix}{n}_proj.{what}", h * dim, cols) for n, h in (("q", heads), ("k", kv_heads), ("v", kv_heads)))
        return Attention(f"{prefix}qkv_proj.{what}", (q, k, v), heads, kv_heads, dim)

    out: list[Module] = [fused("weight", hidden)]
    if biased:
        out.append(fused("bias", 1))
    out.append(ColSharded(Part(prefix + "o_proj.weight", hidden, heads * dim)))
    if config.get("attention_bias", False) and kind in ("llama", "qwen3", "qwen3_moe"):
        out.append(Copied(Part(prefix + "o_proj.bias", hidden)))
    if kind in ("qwen3", "qwen3_moe"):
        out += [Copied(Part(f"{prefix}{n}_norm.weight", dim)) for n in "qk"]
    return out


def _latent_attention(config: Mapping[str, Any], prefix: str) -> list[Module]:
    """DeepSeek's: low-rank projections that every rank has, then one row of heads."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    rank, rotary = config["kv_lora_rank"], config["qk_rope_head_dim"]
    query, nope, value = config.get("q_lora_rank"), config["qk_nope_head_dim"], config["v_head_dim"]
    width = heads * (nope + rotary)
    out: list[Module] = []
    if query is None:
        out.append(_alone(prefix + "q_proj.weight", width, hidden))
    else:
        out += [
            Copied(Part(prefix + "q_a_proj.weight", query, hidden)), Copied(Part(prefix + "q_a_layernorm.weight", query)),
            _alone(prefix + "q_b_proj.weight", width, query),
        ]  # fmt: skip
    return [
        *out,
        Copied(Part(prefix + "kv_a_proj_with_mqa.weight", rank + rotary, hidden)),
        Copied(Part(prefix + "kv_a_layernorm.weight", rank)),
        _alone(prefix + "kv_b_proj.weight", heads * (nope + value), rank),
        ColSharded(Part(prefix + "o_proj.weight", hidden, heads * value)),
    ]


def _alone(name: str, rows: int, cols: int) -> RowSharded:
    return RowSharded(name, (Part(name, rows, cols),))


def _feed_forward(config: Mapping[str, Any], i: int, prefix: str) -> list[Module]:
    kind, hidden = str(config["model_type"]), config["hidden_size"]
    if kind == "mixtral":
        moe = prefix + "block_sparse_moe."
        return [
            Copied(Part(moe + "gate.weight", config["num_local_experts"], hidden)),
            Experts(moe + "experts", config["num_local_experts"], moe + "experts.{}.w1.weight", moe + "experts.{}.w3.weight",
                    moe + "experts.{}.w2.weight", config["intermediate_size"], hidden),
        ]  # fmt: skip
    mlp = prefix + "mlp."
    if not _sparse(config, i):
        return _gated(mlp, config["intermediate_size"], hidden, bool(config.get("mlp_bias", False)))
    count = config["n_routed_experts"] if kind.startswith("deepseek") else config["num_experts"]
    inner = config["moe_intermediate_size"]
    out: list[Module] = [Copied(Part(mlp + "gate.weight", count, hidden))]
    if kind == "deepseek_v3":
        out.append(Copied(Part(mlp + "gate.e_score_correction_bias", count)))
    each = mlp + "experts.{}."
    out.append(Experts(mlp + "experts", count, each + "gate_proj.weight", each + "up_proj.weight", each + "down_proj.weight",
                       inner, hidden))  # fmt: skip
    if kind == "qwen2_moe":
        out += _gated(mlp + "shared_expert.", config["shared_expert_intermediate_size"], hidden, False)
        out.append(Copied(Part(mlp + "shared_expert_gate.weight", 1, hidden)))
    if kind.startswith("deepseek") and config.get("n_shared_experts"):
        out += _gated(mlp + "shared_experts.", inner * config["n_shared_experts"], hidden, False)
    return out


def _sparse(config: Mapping[str, Any], i: int) -> bool:
    kind = str(config["model_type"])
    if kind.startswith("deepseek"):
        return i >= config.get("first_k_dense_replace", 0) and i % config.get("moe_layer_freq", 1) == 0
    if kind.endswith("_moe"):
        return i not in config.get("mlp_only_layers", ()) and (i + 1) % config.get("decoder_sparse_step", 1) == 0
    return False


def _gated(prefix: str, inner: int, hidden: int, bias: bool) -> list[Module]:
    def fused(what: str, cols: int) -> RowSharded:
        parts = tuple(Part(f"{prefix}{n}_proj.{what}", inner, cols) for n in ("gate", "up"))
        return RowSharded(f"{prefix}gate_up_proj.{what}", parts)

    out: list[Module] = [fused("weight", hidden)]
    if bias:
        out.append(fused("bias", 1))
    out.append(ColSharded(Part(prefix + "down_proj.weight", hidden, inner)))
    if bias:
        out.append(Copied(Part(prefix + "down_proj.bias", hidden)))
    return out
