"""The decoder of the Llama family: Llama, Mistral, Qwen2, Qwen2.5, Qwen3.

It runs over tokens in one row, (total), of a `Packed` batch or of the generation engine's cache: whatever has
`positions` and `attend(q, k, v, attention)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..parallel import (
    ColumnParallelLinear,
    ParallelGroups,
    RowParallelLinear,
    SequenceParallel,
    Stages,
    VocabParallelEmbedding,
)
from ..parallel.collectives import whole_rows
from ..parallel.groups import Axis
from ..parallel.sharding import Sharding, mark, sharding_of
from .config import DecoderConfig
from .rope import RotaryTable


class Context(Protocol):
    """What attention needs to know of the other tokens: `positions` (total) of its own, and how to attend to them. Rows past
    the total are padding."""

    positions: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Tensor: ...


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · weight over the last dimension, in float32. `partial`: each tp rank sees other rows or heads."""

    def __init__(
        self, size: int, eps: float, device: torch.device | str | None, dtype: torch.dtype | None, *, partial: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype))
        mark(self.weight, Sharding((size,), partial=partial))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype) * self.weight


class Attention(nn.Module):
    def __init__(
        self, config: DecoderConfig, layer: int, rotary: RotaryTable, groups: ParallelGroups, sequence: SequenceParallel,
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
            bias=config.qkv_bias, groups=groups, device=device, dtype=dtype, sequence=sequence,
        )  # fmt: skip
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * d,
            config.hidden_size,
            bias=config.output_bias,
            groups=groups,
            device=device,
            dtype=dtype,
            sequence=sequence,
        )
        self.q_norm = RMSNorm(d, config.rms_norm_eps, device, dtype, partial=True) if config.qk_norm else None
        self.k_norm = RMSNorm(d, config.rms_norm_eps, device, dtype, partial=True) if config.qk_norm else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], 1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.o_proj(context.attend(q, k, v, self))


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(
        self, config: DecoderConfig, groups: ParallelGroups, sequence: SequenceParallel, device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        made: dict[str, Any] = {"bias": bias, "groups": groups, "device": device, "dtype": dtype, "sequence": sequence}
        self.gate_up_proj = ColumnParallelLinear(hidden, {"gate_proj": inner, "up_proj": inner}, **made)
        self.down_proj = RowParallelLinear(inner, hidden, **made)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(
        self, config: DecoderConfig, layer: int, rotary: RotaryTable, groups: ParallelGroups, sequence: SequenceParallel,
        device: torch.device | str | None, dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        super().__init__()
        norm: dict[str, Any] = {"device": device, "dtype": dtype, "partial": sequence.on}
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **norm)
        self.self_attn = Attention(config, layer, rotary, groups, sequence, device, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **norm)
        self.mlp = MLP(config, groups, sequence, device, dtype)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Layers(nn.ModuleList):
    """The layers of a stage under their numbers in the whole model, which are also their index and their name."""

    def add(self, number: int, layer: Layer) -> None:
        self._modules[str(number)] = layer

    def __iter__(self) -> Iterator[Layer]:
        return iter(self._modules.values())  # type: ignore[arg-type]

    def __getitem__(self, number: int) -> Layer:  # type: ignore[override]
        return list(self)[number] if number < 0 else self._modules[str(number)]  # type: ignore[return-value]


class Decoder(nn.Module):
    """tokens (total) -> hidden (total, H), after the last norm; `logits` of what of it is wanted.

    With a pipeline it holds the layers of this process's stages, the embedding where the first is among them and the norm
    and the head where the last is; `stage` runs one. `checkpoint_activations` keeps only what enters each layer and computes
    the rest again in the backward.

    Args:
        stages: how a pipeline cuts the layers; None cuts them evenly.
        sequence_parallel: the tp ranks share the rows between the blocks. The result is the same.

    Raises:
        ValueError: heads, vocabulary or another width that tp does not divide, or too few layers for the pipeline, by name.
    """

    def __init__(
        self, config: DecoderConfig, *, groups: ParallelGroups | None = None, head: bool = True,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, stages: Stages | None = None,
        sequence_parallel: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config, self.groups = config, groups or ParallelGroups()
        pp = self.groups.pp
        self.groups.check(
            num_attention_heads=config.num_attention_heads, num_key_value_heads=config.num_key_value_heads,
            vocab_size=config.vocab_size, intermediate_size=config.intermediate_size,
        )  # fmt: skip
        self.stages = stages or Stages(config.num_hidden_layers, pp.size)
        self.chunks = self.stages.of_rank(pp.rank)
        self.checkpoint_activations = False
        self.sequence = SequenceParallel(sequence_parallel and self.groups.tp.size > 1)
        self.rotary = RotaryTable(config.rope, config.head_dim)
        made: dict[str, Any] = {"groups": self.groups, "device": device, "dtype": dtype, "sequence": self.sequence}
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, **made) if pp.first else None
        self.layers = Layers()
        for i in (i for chunk in self.chunks for i in chunk):
            self.layers.add(i, Layer(config, i, self.rotary, self.groups, self.sequence, device, dtype))
        self.norm: RMSNorm | None = None
        self.lm_head: VocabParallelEmbedding | None = None
        if pp.last:
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype, partial=self.sequence.on)
            tied = config.tie_word_embeddings
            if head and not (tied and pp.first):
                self.lm_head = VocabParallelEmbedding(config.vocab_size, config.hidden_size, **made)
                if tied:  # a copy of what the first stage holds; their gradients are added up
                    mark(self.lm_head.weight, replace(sharding_of(self.lm_head.weight), tied=True, shared=True))
        self.has_head = head
        self.tied_across_stages = head and config.tie_word_embeddings and pp.size > 1
        if self.tied_across_stages and self.embed_tokens is not None:
            mark(self.embed_tokens.weight, replace(sharding_of(self.embed_tokens.weight), tied=True))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, tokens: Tensor, context: Context) -> Tensor:
        if self.stages.count > 1:
            raise RuntimeError("a decoder cut into pipeline stages runs through training.passes, stage by stage")
        return self.stage(0, tokens, context)

    def stage(self, chunk: int, x: Tensor, context: Context) -> Tensor:
        """One of this process's stages: tokens (total) where it is the model's first, else rows; hidden (total, H) where it
        is the last, else rows."""
        if self.embed_tokens is not None and chunk == 0:
            x = self.embed_tokens(self._padded(x))
        for i in self.chunks[chunk]:
            layer = self.layers[i]
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(layer, x, context, use_reentrant=False)
            else:
                x = layer(x, context)
        if self.norm is None or chunk != len(self.chunks) - 1:
            return x
        x = self.norm(x)
        return whole_rows(x, self.groups.tp)[: context.positions.shape[0]] if self.sequence.on else x

    def _padded(self, tokens: Tensor) -> Tensor:
        short = -tokens.shape[0] % self.groups.tp.size if self.sequence.on else 0
        return F.pad(tokens, (0, short)) if short else tokens

    def rows(self, total: int) -> int:
        """Rows between the stages of a pack of so many tokens."""
        return -(-total // self.groups.tp.size) if self.sequence.on else total

    @contextmanager
    def all_rows(self) -> Iterator[None]:
        """Without sequence parallelism: a few rows are not worth sharing. Only where no gradient is wanted."""
        before, self.sequence.on = self.sequence.on, False
        try:
            yield
        finally:
            self.sequence.on = before

    @property
    def head(self) -> VocabParallelEmbedding:
        """What makes logits of hidden states: the head, or the embedding it is tied to."""
        found = self.lm_head or self.embed_tokens
        assert found is not None, "the head is with the last stage of the pipeline"
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, H) -> (…, V / tp), of this rank's share of the vocabulary."""
        return self.head.logits(hidden)

    @torch.no_grad()
    def initialize(self, seed: int) -> Decoder:
        """Normal weights of the config's initializer_range, those that write to the residual stream smaller by
        √(2 · layers); norms 1, biases 0. The same for every tp and pp: each process draws all and keeps its own."""
        generator = torch.Generator().manual_seed(seed)
        std = self.config.initializer_range
        small = std / math.sqrt(2 * self.config.num_hidden_layers)
        own = dict(self.named_modules())
        everything = self if self.groups.pp.size == 1 else self._whole()
        for name, module in everything.named_modules():
            mine = own.get(name)
            if isinstance(module, VocabParallelEmbedding):
                whole = torch.randn(sharding_of(module.weight).shape, generator=generator) * std
                takers = [mine, *([self.lm_head] if self.tied_across_stages and name == "embed_tokens" else [])]
                for taker in takers:
                    if isinstance(taker, VocabParallelEmbedding):
                        taker.load(name, "weight", whole)
            elif isinstance(module, ColumnParallelLinear):
                for part, width in module.parts.items():
                    whole = torch.randn((width * module.axis.size, module.weight.shape[1]), generator=generator) * std
                    if isinstance(mine, ColumnParallelLinear):
                        mine.load(part, "weight", whole)
            elif isinstance(module, RowParallelLinear):
                whole = torch.randn(sharding_of(module.weight).shape, generator=generator) * small
                if isinstance(mine, RowParallelLinear):
                    mine.load(name, "weight", whole)
        for module in own.values():
            if isinstance(module, RMSNorm):
                module.weight.fill_(1)
            elif isinstance(module, ColumnParallelLinear | RowParallelLinear) and module.bias is not None:
                module.bias.zero_()
        return self

    def _whole(self) -> Decoder:
        """All stages, without memory."""
        groups = replace(self.groups, pp=Axis())
        return Decoder(self.config, groups=groups, head=self.has_head, device="meta")

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
