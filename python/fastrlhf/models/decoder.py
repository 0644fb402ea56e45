"""The decoder of the Llama family: Llama, Mistral, Qwen2, Qwen2.5, Qwen3.

It runs over tokens in one row, (total), of a `Packed` batch or of the generation engine's cache: whatever has
`positions` and `attend(q, k, v, attention)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..parallel import ColumnParallelLinear, ParallelGroups, RowParallelLinear, VocabParallelEmbedding
from .config import DecoderConfig
from .rope import RotaryTable


class Context(Protocol):
    """What attention needs to know of the other tokens."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Tensor: ...


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · weight over the last dimension, in float32."""

    def __init__(self, size: int, eps: float, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype) * self.weight


class Attention(nn.Module):
    def __init__(
        self, config: DecoderConfig, layer: int, rotary: RotaryTable, groups: ParallelGroups,
        device: torch.device | str | None, dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.layer, self.rotary, self.window = layer, rotary, config.window(layer)
        self.head_dim = d = config.head_dim
        self.heads = groups.tp.share("num_attention_heads", config.num_attention_heads)
        self.kv_heads = groups.tp.share("num_key_value_heads", config.num_key_value_heads)
        kv = config.num_key_value_heads * d
        self.qkv_proj = ColumnParallelLinear(
            config.hidden_size, {"q_proj": config.num_attention_heads * d, "k_proj": kv, "v_proj": kv},
            bias=config.qkv_bias, groups=groups, device=device, dtype=dtype,
        )  # fmt: skip
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * d,
            config.hidden_size,
            bias=config.output_bias,
            groups=groups,
            device=device,
            dtype=dtype,
        )
        self.q_norm = RMSNorm(d, config.rms_norm_eps, device, dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(d, config.rms_norm_eps, device, dtype) if config.qk_norm else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        heads = self.qkv_proj(x).view(x.shape[0], -1, self.head_dim)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], 1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.o_proj(context.attend(q, k, v, self))


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(
        self, config: DecoderConfig, groups: ParallelGroups, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up_proj = ColumnParallelLinear(
            hidden, {"gate_proj": inner, "up_proj": inner}, bias=bias, groups=groups, device=device, dtype=dtype
        )
        self.down_proj = RowParallelLinear(inner, hidden, bias=bias, groups=groups, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(
        self, config: DecoderConfig, layer: int, rotary: RotaryTable, groups: ParallelGroups,
        device: torch.device | str | None, dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)
        self.self_attn = Attention(config, layer, rotary, groups, device, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)
        self.mlp = MLP(config, groups, device, dtype)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """tokens (total) -> hidden (total, H), after the last norm; `logits` of what of it is wanted.

    `checkpoint_activations` keeps only what enters each layer and computes the rest again in the backward.
    """

    def __init__(
        self, config: DecoderConfig, *, groups: ParallelGroups | None = None, head: bool = True,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config, self.groups = config, groups or ParallelGroups()
        self.checkpoint_activations = False
        self.rotary = RotaryTable(config.rope, config.head_dim)
        made = {"groups": self.groups, "device": device, "dtype": dtype}
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, **made)  # type: ignore[arg-type]
        self.layers = nn.ModuleList(
            Layer(config, i, self.rotary, self.groups, device, dtype) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)
        self.lm_head = None
        if head and not config.tie_word_embeddings:
            self.lm_head = VocabParallelEmbedding(config.vocab_size, config.hidden_size, **made)  # type: ignore[arg-type]

    def forward(self, tokens: Tensor, context: Context) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(layer, x, context, use_reentrant=False)
            else:
                x = layer(x, context)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, H) -> (…, V / tp), of this rank's share of the vocabulary."""
        return (self.lm_head or self.embed_tokens).logits(hidden)

    @torch.no_grad()
    def initialize(self, seed: int) -> Decoder:
        """Normal weights of the config's initializer_range, those that write to the residual stream smaller by
        √(2 · layers); norms 1, biases 0. The same for every tp."""
        generator = torch.Generator().manual_seed(seed)
        std = self.config.initializer_range
        small = std / math.sqrt(2 * self.config.num_hidden_layers)
        for name, module in self.named_modules():
            if isinstance(module, VocabParallelEmbedding):
                shape = (module.rows * module.axis.size, module.weight.shape[1])
                module.load(name, "weight", torch.randn(shape, generator=generator) * std)
            elif isinstance(module, ColumnParallelLinear):
                for part, width in module.parts.items():
                    shape = (width * module.axis.size, module.weight.shape[1])
                    module.load(part, "weight", torch.randn(shape, generator=generator) * std)
            elif isinstance(module, RowParallelLinear):
                shape = (module.weight.shape[0], module.weight.shape[1] * module.axis.size)
                module.load(name, "weight", torch.randn(shape, generator=generator) * small)
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1)
            if isinstance(module, ColumnParallelLinear | RowParallelLinear) and module.bias is not None:
                module.bias.zero_()
        return self

    @property
    def kv_shape(self) -> tuple[int, int]:
        """(key-value heads of this rank, their width)."""
        config = self.config
        return self.groups.tp.share("num_key_value_heads", config.num_key_value_heads), config.head_dim

    def linears(self) -> Iterator[tuple[str, ColumnParallelLinear | RowParallelLinear]]:
        """The projections of every layer, by name."""
        for name, module in self.named_modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                yield name, module
