"""Layouts written down a second time, by gathering whole tensors and splitting them again, as trainers and engines do it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from fastrlhf.refit.catalogue import Catalogue
from fastrlhf.refit.layouts import Layout
from fastrlhf.refit.memory import Places, copies, run
from fastrlhf.refit.plan import Plan
from torch import Tensor


def config(**more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama", "vocab_size": 301, "hidden_size": 8, "intermediate_size": 840, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 2, "torch_dtype": "float32", **more,
    }  # fmt: skip


def whole(catalogue: Catalogue, seed: int = 0) -> dict[str, Tensor]:
    """Every Hugging Face tensor, each element another."""
    out, at = {}, seed
    for name, (rows, cols) in zip(catalogue.tensors.names, catalogue.tensors.shape.tolist(), strict=True):
        out[name] = torch.arange(at, at + rows * cols, dtype=torch.float32).view(rows, cols)
        at += rows * cols
    return out


def pad_rows(t: Tensor, rows: int) -> Tensor:
    return torch.cat([t, torch.zeros(rows - t.shape[0], t.shape[1])])


class Split:
    """The parameters of every rank, by (rank, name)."""

    def __init__(self, c: dict[str, Any], layout: Layout, tensors: dict[str, Tensor]) -> None:
        self.c, self.layout, self.t = c, layout, tensors
        self.out: dict[tuple[int, str], Tensor] = {}
        tp, layers = layout.tp, c["num_hidden_layers"]
        stages = layout.stage_of(layers)
        tied = c.get("tie_word_embeddings", False)
        self.vocab("model.embed_tokens.weight", "model.embed_tokens.weight", 0)
        for i in range(layers):
            self.layer(f"model.layers.{i}.", stages[i])
        self.copied("model.norm.weight", layout.pp - 1)
        if not tied:
            self.vocab("lm_head.weight", "lm_head.weight", layout.pp - 1)
        elif layout.untie or (layout.tied_copy and layout.pp > 1):
            self.vocab("model.embed_tokens.weight", "lm_head.weight", layout.pp - 1)
        assert tp

    def ranks(self, stage: int) -> list[tuple[int, int]]:
        n = self.layout.dp * self.layout.tp
        return [(stage * n + i, i % self.layout.tp) for i in range(n)]

    def copied(self, name: str, stage: int) -> None:
        for rank, _ in self.ranks(stage):
            self.out[rank, name] = self.t[name]

    def vocab(self, source: str, name: str, stage: int) -> None:
        tp, m = self.layout.tp, self.layout.vocab_multiple
        rows = self.t[source].shape[0]
        if m:
            unit = math.lcm(m * (tp if self.layout.vocab_multiple_per_rank else 1), tp)
            rows = math.ceil(rows / unit) * unit
        chunks = pad_rows(self.t[source], rows).chunk(tp)
        for rank, t in self.ranks(stage):
            self.out[rank, name] = chunks[t]

    def rows(self, name: str, parts: list[str], stage: int) -> None:
        for rank, t in self.ranks(stage):
            shares = [self.t[p].chunk(self.layout.tp)[t] for p in parts]
            if self.layout.fused:
                self.out[rank, name] = torch.cat(shares)
            else:
                self.out.update({(rank, p): s for p, s in zip(parts, shares, strict=True)})

    def cols(self, name: str, stage: int) -> None:
        for rank, t in self.ranks(stage):
            self.out[rank, name] = self.t[name].chunk(self.layout.tp, 1)[t]

    def layer(self, p: str, stage: int) -> None:
        c = self.c
        self.copied(p + "input_layernorm.weight", stage)
        self.copied(p + "post_attention_layernorm.weight", stage)
        for kind in ["weight"] + (["bias"] if c["model_type"] == "qwen2" else []):
            self.attention(p + "self_attn.", kind, stage)
        self.cols(p + "self_attn.o_proj.weight", stage)
        if c["model_type"] == "mixtral":
            self.copied(p + "block_sparse_moe.gate.weight", stage)
            self.experts(p + "block_sparse_moe.experts", stage)
            return
        self.rows(p + "mlp.gate_up_proj.weight", [p + "mlp.gate_proj.weight", p + "mlp.up_proj.weight"], stage)
        self.cols(p + "mlp.down_proj.weight", stage)

    def attention(self, p: str, kind: str, stage: int) -> None:
        q, k, v = (self.t[f"{p}{n}_proj.{kind}"] for n in "qkv")
        groups, d = self.c["num_key_value_heads"], self.c["head_dim"]
        tp = self.layout.tp
        for rank, t in self.ranks(stage):
            if self.layout.interleaved:  # group by group, then raw rows
                cols = q.shape[1]
                raw = torch.cat([q.view(groups, -1, cols), k.view(groups, d, cols), v.view(groups, d, cols)], 1).view(-1, cols)
                self.out[rank, f"{p}qkv_proj.{kind}"] = raw.chunk(tp)[t]
                continue
            if groups >= tp:
                mine = [k.chunk(tp)[t], v.chunk(tp)[t]]
            else:
                mine = [k.chunk(groups)[t * groups // tp], v.chunk(groups)[t * groups // tp]]
            mine = [q.chunk(tp)[t], *mine]
            if self.layout.fused:
                self.out[rank, f"{p}qkv_proj.{kind}"] = torch.cat(mine)
            else:
                self.out.update({(rank, f"{p}{n}_proj.{kind}"): x for n, x in zip("qkv", mine, strict=True)})

    def experts(self, name: str, stage: int) -> None:
        ep, etp, count = self.layout.ep, self.layout.etp, self.c["num_local_experts"]
        for i, (rank, _) in enumerate(self.ranks(stage)):
            share = count // ep
            mine = range(i // etp % ep * share, (i // etp % ep + 1) * share)
            w1, w3, w2 = ([self.t[f"{name}.{e}.{w}.weight"] for e in mine] for w in ("w1", "w3", "w2"))
            cut = i % etp
            self.out[rank, name + ".w13"] = torch.cat(
                [torch.cat([a.chunk(etp)[cut], b.chunk(etp)[cut]]) for a, b in zip(w1, w3)]
            )
            self.out[rank, name + ".w2"] = torch.cat([x.chunk(etp, 1)[cut] for x in w2])


def execute(plan: Plan, source: dict[tuple[int, str], Tensor]) -> dict[tuple[int, str], Tensor]:
    """Every destination rank's parameters after the plan's copies, by the copy engine; NaN where nothing was written."""
    p = plan.dest.params
    out = {
        (int(r), n): torch.full(tuple(s), float("nan"))
        for r, n, s in zip(p.rank, p.names, p.shape.tolist(), strict=True)
    }  # fmt: skip
    for s in np.unique(plan.source_rank):
        keep = {n: t.contiguous() for (r, n), t in source.items() if r == s}
        held = Places.of_tensors(plan.source, int(s), keep)
        for d in np.unique(plan.dest_rank):
            written = {n: t for (r, n), t in out.items() if r == d}
            run(copies(plan, plan.between(int(s), int(d)), held, Places.of_tensors(plan.dest, int(d), written)))
    for param, row, col, rows, cols in plan.dest.pads.tolist():
        out[int(p.rank[param]), p.names[param]][row : row + rows, col : col + cols] = 0
    return out
