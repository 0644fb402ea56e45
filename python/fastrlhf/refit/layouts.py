"""How a trainer or an engine lays a model out over its ranks, as a catalogue.

    catalogue_for(model_of(config), layout("tp8pp4", "megatron"))

Rank = (pipeline stage · dp + dp rank) · tp + tp rank. Within a stage, experts lie on a grid of dp · tp ranks: expert-tensor
rank fastest, then expert rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import lcm

from .catalogue import Builder, Catalogue, PlanError, split
from .shapes import Attention, ColSharded, Copied, Experts, Model, Module, Part, RowSharded

KINDS = ("hf", "decoder", "megatron", "engine")


@dataclass(frozen=True)
class Layout:
    """
    Args:
        interleaved: query, key and value rows by key-value group, [q ... q k v] after each other, cut by tp anywhere
            (Megatron); else [Q | K | V] of the rank's own heads, key-value heads repeated where there are fewer than tp.
        fused: query, key and value are one parameter, and so are gate and up, and the matrices of a rank's experts.
        vocab_multiple: the vocabulary is padded to a multiple of this (and of tp); 0 does not pad and needs tp to divide it.
        vocab_multiple_per_rank: that multiple is of each rank's share.
        tied_copy: the last stage holds a copy of a tied embedding.
        untie: a tied embedding is also held as the head, a parameter of its own.
        stages: layers of each pipeline stage; empty shares them out, the first stages taking one more.
        virtual: pieces a stage's layers come in (interleaved schedules).
        quantise: (rows, cols) of a block: the large matrices are float8_e4m3fn with float32 scales, `<name>_scale_inv`.
    """

    kind: str = "engine"
    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = 1
    interleaved: bool = False
    fused: bool = True
    vocab_multiple: int = 0
    vocab_multiple_per_rank: bool = False
    tied_copy: bool = False
    untie: bool = False
    stages: tuple[int, ...] = ()
    virtual: int = 1
    quantise: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "dp", "ep", "etp", "virtual"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name}: expected >= 1, got {getattr(self, name)}")
        if (self.tp * self.dp) % (self.ep * self.etp):
            raise PlanError(f"ep, etp: {self.ep} x {self.etp} does not divide the {self.tp * self.dp} ranks of a stage")

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.dp

    def stage_of(self, layers: int) -> list[int]:
        """The stage of each layer."""
        if self.stages:
            if len(self.stages) != self.pp or sum(self.stages) != layers:
                raise PlanError(f"stages: expected {self.pp} numbers that add up to {layers}, got {self.stages}")
            return [s for s, n in enumerate(self.stages) for _ in range(n)]
        if self.virtual > 1:
            if layers % (self.pp * self.virtual):
                raise PlanError(f"virtual: {layers} layers do not divide into {self.pp} x {self.virtual} pieces")
            piece = layers // (self.pp * self.virtual)
            return [i // piece % self.pp for i in range(layers)]
        low, more = divmod(layers, self.pp)
        return [s for s in range(self.pp) for _ in range(low + (s < more))]


def layout(sizes: str, kind: str) -> Layout:
    """From words like tp8pp4, tp8pp16ep64, and one of KINDS: hf (whole tensors on one rank), decoder (fastrlhf's own),
    megatron, engine (as vLLM, SGLang and TensorRT-LLM: padded vocabulary, repeated key-value heads)."""
    found = re.findall(r"(tp|pp|dp|ep|etp|vpp)(\d+)", sizes)
    if "".join(a + b for a, b in found) != sizes or not sizes or len({a for a, _ in found}) != len(found):
        raise PlanError(f"layout: expected sizes as in tp8pp4 or tp8pp16ep64etp1, got {sizes!r}")
    given = {{"vpp": "virtual"}.get(name, name): int(number) for name, number in found}
    presets: dict[str, dict[str, object]] = {
        "hf": {"fused": False},
        "decoder": {},
        "megatron": {"interleaved": True, "vocab_multiple": 128, "vocab_multiple_per_rank": True, "tied_copy": True},
        "engine": {"vocab_multiple": 64},
    }
    if kind not in presets:
        raise PlanError(f"layout: expected one of {', '.join(KINDS)}, got {kind!r}")
    made = replace(Layout(kind=kind, **presets[kind]), **given)  # type: ignore[arg-type]
    if kind == "hf" and made.ranks > 1:
        raise PlanError(f"layout: hf holds whole tensors on one rank, got {sizes}")
    return made


def catalogue_for(model: Model, layout: Layout) -> Catalogue:
    """
    Raises:
        PlanError: heads, rows, columns or experts that cannot be shared out evenly.
    """
    return _Writer(model, layout).write()


class _Writer:
    def __init__(self, model: Model, layout: Layout) -> None:
        self.model, self.layout = model, layout
        self.builder = Builder(layout.ranks)

    def write(self) -> Catalogue:
        model, layout = self.model, self.layout
        handlers: dict[type[Module], Callable[..., None]] = {
            Copied: self._copied, RowSharded: self._row_sharded, ColSharded: self._col_sharded, Attention: self._attention,
            Experts: self._experts,
        }  # fmt: skip
        head = model.head
        self._vocab(model.embedding, "model.embed_tokens.weight", 0)
        for stage, layer in zip(layout.stage_of(len(model.layers)), model.layers, strict=True):
            for module in layer:
                handlers[type(module)](module, stage)
        self._copied(Copied(model.norm), layout.pp - 1)
        if head is not None:
            self._vocab(head, head.name, layout.pp - 1)
        elif layout.untie or (layout.tied_copy and layout.pp > 1):
            self._vocab(model.embedding, "lm_head.weight", layout.pp - 1)
        return self.builder.build()

    def _ranks(self, stage: int) -> Iterator[tuple[int, int]]:
        """(rank, tp rank) of a stage."""
        for i in range(self.layout.dp * self.layout.tp):
            yield stage * self.layout.dp * self.layout.tp + i, i % self.layout.tp

    def _kinds(self, part: Part, name: str, block: tuple[int, int]) -> Iterator[tuple[int, str, str, int, int]]:
        """(tensor, parameter's name, dtype, block rows, block cols): the part itself, and its scales where it is quantised."""
        if part.cols == 1:
            yield self.builder.tensor(part.name, part.rows, part.cols, self.model.dtype), name, self.model.dtype, 1, 1
            return
        high, wide = block
        yield self.builder.tensor(part.name, part.rows, part.cols, "float8_e4m3fn", block), name, "float8_e4m3fn", 1, 1
        scales = self.builder.tensor(part.name + "_scale_inv", -(-part.rows // high), -(-part.cols // wide), "float32")
        yield scales, name + "_scale_inv", "float32", high, wide

    def _matrix(
        self, rank: int, name: str, pieces: list[tuple[Part, int, int, int, int, int, int]], rows: int, cols: int,
        quantised: bool = True,
    ) -> list[int]:  # fmt: skip
        """A parameter (rows, cols) of (part, row, col, rows, cols, at, at_col); returns it and its scales."""
        block, dtype = self.layout.quantise if quantised else None, self.model.dtype
        if block is None:
            param = self.builder.param(rank, name, rows, cols, dtype)
            for part, row, col, height, width, at, at_col in pieces:
                tensor = self.builder.tensor(part.name, part.rows, part.cols, dtype)
                self.builder.put(tensor, row, col, height, width, param, at, at_col)
            return [param]
        params: dict[str, int] = {}
        for part, row, col, height, width, at, at_col in pieces:
            for tensor, title, dtype, high, wide in self._kinds(part, name, block):
                if title not in params:
                    params[title] = self.builder.param(rank, title, -(-rows // high), -(-cols // wide), dtype)
                if row % high or col % wide or at % high or at_col % wide:
                    raise PlanError(
                        f"{part.name}: row {row}, column {col} of rank {rank} cuts a quantisation block of {high} x {wide}; "
                        "quantise before the split, or shard by whole blocks"
                    )
                self.builder.put(
                    tensor, row // high, col // wide, -(-height // high), -(-width // wide), params[title], at // high,
                    at_col // wide,
                )  # fmt: skip
        return list(params.values())

    def _copied(self, module: Copied, stage: int) -> None:
        part = module.part
        for rank, _ in self._ranks(stage):
            self._matrix(rank, part.name, [(part, 0, 0, part.rows, part.cols, 0, 0)], part.rows, part.cols, False)

    def _col_sharded(self, module: ColSharded, stage: int) -> None:
        part = module.part
        for rank, t in self._ranks(stage):
            a, b = split(part.name + " columns", part.cols, self.layout.tp, t)
            self._matrix(rank, part.name, [(part, 0, a, part.rows, b - a, 0, 0)], part.rows, b - a)

    def _row_sharded(self, module: RowSharded, stage: int) -> None:
        for rank, t in self._ranks(stage):
            shares = [(p, *split(p.name, p.rows, self.layout.tp, t)) for p in module.parts]
            self._stacked(rank, module.name, shares)

    def _stacked(self, rank: int, name: str, shares: list[tuple[Part, int, int]]) -> None:
        """Rows [a, b) of parts below each other in one parameter, or each in its own."""
        if not self.layout.fused:
            for part, a, b in shares:
                self._matrix(rank, part.name, [(part, a, 0, b - a, part.cols, 0, 0)], b - a, part.cols)
            return
        at, pieces = 0, []
        for part, a, b in shares:
            pieces.append((part, a, 0, b - a, part.cols, at, 0))
            at += b - a
        self._matrix(rank, name, pieces, at, shares[0][0].cols)

    def _attention(self, module: Attention, stage: int) -> None:
        q, k, v = module.parts
        tp, dim, groups = self.layout.tp, module.dim, module.kv_heads
        for rank, t in self._ranks(stage):
            if self.layout.interleaved:
                self._interleaved(rank, t, module)
                continue
            a, b = split(f"{module.name} query heads", module.heads, tp, t)
            if groups % tp and tp % groups:
                raise PlanError(f"{module.name}: {groups} key-value heads among {tp} ranks: neither divides the other")
            c, d = split("", groups, tp, t) if groups >= tp else (t // (tp // groups), t // (tp // groups) + 1)
            self._stacked(rank, module.name, [(q, a * dim, b * dim), (k, c * dim, d * dim), (v, c * dim, d * dim)])

    def _interleaved(self, rank: int, t: int, module: Attention) -> None:
        q, k, v = module.parts
        each, dim = module.heads // module.kv_heads * module.dim, module.dim
        group = each + 2 * dim
        low, high = split(f"{module.name} rows", group * module.kv_heads, self.layout.tp, t)
        pieces = []
        for g in range(low // group, -(-high // group)):
            for part, begin, rows, row in ((q, 0, each, g * each), (k, each, dim, g * dim), (v, each + dim, dim, g * dim)):
                a, b = max(low, g * group + begin), min(high, g * group + begin + rows)
                if a < b:
                    pieces.append((part, row + a - g * group - begin, 0, b - a, q.cols, a - low, 0))
        self._matrix(rank, module.name, pieces, high - low, q.cols)

    def _vocab(self, part: Part, name: str, stage: int) -> None:
        layout, rows = self.layout, part.rows
        if layout.vocab_multiple:
            unit = layout.vocab_multiple * (layout.tp if layout.vocab_multiple_per_rank else 1)
            rows = -(-rows // lcm(unit, layout.tp)) * lcm(unit, layout.tp)
        tensor = self.builder.tensor(part.name, part.rows, part.cols, self.model.dtype)
        for rank, t in self._ranks(stage):
            a, b = split(f"{part.name} vocabulary", rows, layout.tp, t)
            param = self.builder.param(rank, name, b - a, part.cols, self.model.dtype)
            true = min(b, part.rows)
            self.builder.put(tensor, a, 0, max(0, true - a), part.cols, param)
            self.builder.pad(param, max(0, true - a), 0, b - max(a, true), part.cols)

    def _experts(self, module: Experts, stage: int) -> None:
        layout = self.layout
        for i, (rank, _) in enumerate(self._ranks(stage)):
            first, last = split(f"{module.name} experts", module.count, layout.ep, i // layout.etp % layout.ep)
            a, b = split(f"{module.name} rows", module.inner, layout.etp, i % layout.etp)
            n, hidden = b - a, module.hidden
            up_gate, down = [], []
            for e in range(first, last):
                gate, up = Part(module.gate.format(e), module.inner, hidden), Part(module.up.format(e), module.inner, hidden)
                out = Part(module.down.format(e), hidden, module.inner)
                if not layout.fused:
                    self._matrix(rank, gate.name, [(gate, a, 0, n, hidden, 0, 0)], n, hidden)
                    self._matrix(rank, up.name, [(up, a, 0, n, hidden, 0, 0)], n, hidden)
                    self._matrix(rank, out.name, [(out, 0, a, hidden, n, 0, 0)], hidden, n)
                    continue
                at = (e - first) * 2 * n
                up_gate += [(gate, a, 0, n, hidden, at, 0), (up, a, 0, n, hidden, at + n, 0)]
                down.append((out, 0, a, hidden, n, (e - first) * hidden, 0))
            if layout.fused:
                self._matrix(rank, module.name + ".w13", up_gate, (last - first) * 2 * n, hidden)
                self._matrix(rank, module.name + ".w2", down, (last - first) * hidden, n)
