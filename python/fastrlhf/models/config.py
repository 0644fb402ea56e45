"""The architecture of a decoder of the Llama family, from and to Hugging Face's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ARCHITECTURES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class DecoderConfig:
    """Names are Hugging Face's. `source` is the config.json it was read from, kept for what we do not interpret."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()  # one a layer: how many positions it sees, itself among them; None is all
    initializer_range: float = 0.02
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.model_type not in ARCHITECTURES:
            raise ValueError(f"model_type: expected one of {tuple(ARCHITECTURES)}, got {self.model_type!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads: {self.num_attention_heads} is no multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number for rotary positions, got {self.head_dim}")
        kind = self.rope["rope_type"]
        if kind not in _ROPE_TYPES:
            raise ValueError(f"rope_type: expected one of {_ROPE_TYPES}, got {kind!r}")

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    @staticmethod
    def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
        """From the contents of a config.json, of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters).

        Raises:
            ValueError: a model_type, activation or rope type that is not supported; a key that is missing.
        """
        kind = config.get("model_type", "")
        if kind not in ARCHITECTURES:
            raise ValueError(f"model_type: expected one of {tuple(ARCHITECTURES)}, got {kind!r}")
        if (act := config.get("hidden_act", "silu")) != "silu":
            raise ValueError(f"hidden_act: expected 'silu', got {act!r}")
        try:
            hidden, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
            vocab, inner = config["vocab_size"], config["intermediate_size"]
        except KeyError as missing:
            raise ValueError(f"config.json: {missing} is missing") from None
        bias = bool(config.get("attention_bias", False))
        default_head_dim = 128 if kind == "qwen3" else hidden // heads
        return DecoderConfig(
            model_type=kind,
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or default_head_dim,
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope=_rope_of(config),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=True if kind == "qwen2" else bias,
            output_bias=bias and kind in ("llama", "qwen3"),
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=kind == "qwen3",
            windows=_windows_of(config, layers),
            initializer_range=config.get("initializer_range", 0.02),
            source=dict(config),
        )

    def to_hf(self, kind: str = "CausalLM") -> dict[str, Any]:
        """The contents of a config.json that transformers reads; `kind` is what follows the family's name in
        `architectures`: "CausalLM" or "ForSequenceClassification"."""
        rope = dict(self.rope)
        theta = rope.pop("rope_theta")
        name = ARCHITECTURES[self.model_type]
        out: dict[str, Any] = {
            **self.source,
            "architectures": [f"{name}For{kind}" if not kind.startswith("For") else name + kind],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            # both generations of transformers read their own
            "rope_theta": theta,
            "rope_scaling": None if rope["rope_type"] == "default" else rope,
            "rope_parameters": {"rope_theta": theta, **rope},
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": self.initializer_range,
        }
        if self.model_type in ("llama", "qwen3"):
            out["attention_bias"] = self.qkv_bias
        if self.model_type == "llama":
            out["mlp_bias"] = self.mlp_bias
        return out


def _rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    given = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    theta = given.pop("rope_theta", None) or config.get("rope_theta", 10000.0)
    if kind in ("llama3", "yarn"):
        given.setdefault("original_max_position_embeddings", config.get("max_position_embeddings", 2048))
    return {"rope_type": kind, "rope_theta": float(theta), **given}


def _windows_of(config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window")
    kind = config["model_type"]
    if window is None or (kind in ("qwen2", "qwen3") and not config.get("use_sliding_window", False)) or kind == "llama":
        return ()
    if kind == "mistral":
        return (window,) * layers
    first = config.get("max_window_layers", 28)
    types = config.get("layer_types") or ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    return tuple(window if t == "sliding_attention" else None for t in types)
