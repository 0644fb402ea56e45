"""The join of two catalogues into a fixed list of 2-D copies, proven complete before the first of them runs.

A plan is computed once for a run; a refit then only copies. Both sides compute it, or one sends it, and they compare its
digest: sides that disagree on any name, shape, region or order refuse each other.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .balance import choose
from .catalogue import DTYPES, Catalogue, Ints, PlanError, Tensors, sizes
from .cover import Rectangles, cover

OP = ("source", "source_row", "source_col", "dest", "dest_row", "dest_col", "rows", "cols")


@dataclass(frozen=True)
class Plan:
    """
    Args:
        ops: (n, 8) of OP: `rows` x `cols` elements of the source's param at (source_row, source_col) go to the
            destination's at (dest_row, dest_col). In the order of the source's parameters: by rank, then by layer.
    """

    source: Catalogue
    dest: Catalogue
    ops: Ints

    def column(self, name: str) -> Ints:
        return self.ops[:, OP.index(name)]

    @cached_property
    def nbytes(self) -> Ints:
        """Bytes of each op."""
        return self.column("rows") * self.column("cols") * sizes(self.dest.params.dtype[self.column("dest")])

    @cached_property
    def source_rank(self) -> Ints:
        return self.source.params.rank[self.column("source")]

    @cached_property
    def dest_rank(self) -> Ints:
        return self.dest.params.rank[self.column("dest")]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything both sides must agree on."""
        sha = hashlib.sha256(b"fastrlhf refit plan 1")
        for side in (self.source, self.dest):
            sha.update("\n".join([*side.tensors.names, "", *side.params.names]).encode())
            for table in (
                side.tensors.shape, side.tensors.dtype, side.tensors.block, side.params.rank, side.params.shape,
                side.params.dtype, side.pads,
            ):  # fmt: skip
                sha.update(np.ascontiguousarray(table, "<i8").tobytes())
        sha.update(np.ascontiguousarray(self.ops, "<i8").tobytes())
        return sha.hexdigest()

    def between(self, source: int | None = None, dest: int | None = None) -> Ints:
        """Numbers of the ops from a source rank, to a destination rank, or both."""
        kept = np.ones(len(self.ops), bool)
        if source is not None:
            kept &= self.source_rank == source
        if dest is not None:
            kept &= self.dest_rank == dest
        return np.flatnonzero(kept)


def make_plan(source: Catalogue, dest: Catalogue, *, ignore: frozenset[str] = frozenset()) -> Plan:
    """The copies that make `dest` hold what `source` holds.

    Args:
        ignore: tensors of the source that the destination does without, as a value head.

    Raises:
        PlanError: a tensor that one side lacks, shapes or dtypes that differ, a quantisation block that a shard cuts, an
            element of the destination that is written never or more than once, an element of the source that goes nowhere.
    """
    _check_side("source", source)
    _check_side("destination", dest)
    number = _match(source.tensors, dest.tensors, ignore)
    wanted = dest.regions.copy()
    wanted[:, 0] = number[wanted[:, 0]]
    held, group = _distinct(_disjoint(source))
    ops, candidates = _join(held, group, wanted)
    nbytes = ops[:, 6] * ops[:, 7] * sizes(dest.params.dtype[ops[:, 3]])
    chosen = choose(candidates, source.params.rank[held[:, 5]], source.places, dest.places[dest.params.rank[ops[:, 3]]], nbytes)
    region = held[chosen]
    # a replica may lie elsewhere in its parameter
    ops[:, 0] = region[:, 5]
    ops[:, 1] += region[:, 6]
    ops[:, 2] += region[:, 7]
    _prove_written_once(ops, dest)
    _prove_read(source, wanted, ignore)
    return Plan(source, dest, _joined(ops))


def _match(source: Tensors, dest: Tensors, ignore: frozenset[str]) -> Ints:
    """The source's number of each of the destination's tensors."""
    index = {name: i for i, name in enumerate(source.names)}
    if missing := [n for n in dest.names if n not in index]:
        raise PlanError(f"{missing[0]}: the destination needs it and the source has no such tensor ({len(missing)} in all)")
    known = set(dest.names)
    if unmapped := [n for n in source.names if n not in known and n not in ignore]:
        raise PlanError(f"{unmapped[0]}: the source has it and it goes nowhere ({len(unmapped)} in all)")
    number = np.array([index[n] for n in dest.names], np.int64)
    for what, a, b in (("shape", source.shape, dest.shape), ("block", source.block, dest.block)):
        if (differ := np.flatnonzero((a[number] != b).any(1))).size:
            i = int(differ[0])
            raise PlanError(f"{dest.names[i]}: {what} {tuple(a[number[i]].tolist())} in the source, "
                            f"{tuple(b[i].tolist())} in the destination")  # fmt: skip
    if (differ := np.flatnonzero(source.dtype[number] != dest.dtype)).size:
        i = int(differ[0])
        raise PlanError(f"{dest.names[i]}: {DTYPES[source.dtype[number[i]]]} in the source, {DTYPES[dest.dtype[i]]} in the "
                        "destination")  # fmt: skip
    return number


def _check_side(name: str, side: Catalogue) -> None:
    tensor, row, col, rows, cols, param, at, at_col = side.regions.T
    shape, block = side.tensors.shape[tensor], side.tensors.block[tensor]
    low, size = np.stack([row, col], 1), np.stack([rows, cols], 1)
    local = np.stack([at, at_col], 1)

    def refuse(bad: Ints, why: str) -> None:
        if bad.size:
            i = int(bad[0])
            raise PlanError(
                f"{side.tensors.names[tensor[i]]}: rows {row[i]}..{row[i] + rows[i]}, columns {col[i]}..{col[i] + cols[i]} "
                f"in {side.params.title(int(param[i]))} of the {name}: {why}"
            )

    refuse(np.flatnonzero((low < 0).any(1) | (size < 1).any(1) | (low + size > shape).any(1)), "outside the tensor")
    refuse(np.flatnonzero((local < 0).any(1) | (local + size > side.params.shape[param]).any(1)), "outside the parameter")
    refuse(np.flatnonzero(side.tensors.dtype[tensor] != side.params.dtype[param]), "the parameter has another dtype")
    cut = (low % block != 0) | (((low + size) % block != 0) & (low + size != shape)) | (local % block != 0)
    refuse(np.flatnonzero(cut.any(1)), "cuts a quantisation block; quantise before the split, or shard by whole blocks")


def _disjoint(source: Catalogue) -> Ints:
    """The source's regions, those of them cut that overlap others without being equal to them."""
    regions = source.regions
    _, first = np.unique(regions[:, :5], axis=0, return_index=True)
    once = regions[first]
    cells = cover(Rectangles(once[:, 0], once[:, 1], once[:, 2], once[:, 3], once[:, 4]), source.tensors.shape)
    tangled = np.unique(cells.area[cells.times > 1])
    if not tangled.size:
        return regions
    pieces = [regions[~np.isin(regions[:, 0], tangled)]]
    for tensor in tangled:
        mine = regions[regions[:, 0] == tensor]
        rows = np.unique(np.concatenate([mine[:, 1], mine[:, 1] + mine[:, 3]]))
        cols = np.unique(np.concatenate([mine[:, 2], mine[:, 2] + mine[:, 4]]))
        for t, row, col, height, width, param, at, at_col in mine.tolist():
            r = rows[(rows >= row) & (rows <= row + height)]
            c = cols[(cols >= col) & (cols <= col + width)]
            top, left = (a.reshape(-1) for a in np.meshgrid(r[:-1], c[:-1], indexing="ij"))
            high, wide = (a.reshape(-1) for a in np.meshgrid(np.diff(r), np.diff(c), indexing="ij"))
            n = np.full_like(top, 1)
            pieces.append(np.stack([n * t, top, left, high, wide, n * param, at + top - row, at_col + left - col], 1))
    return np.concatenate(pieces)


def _distinct(regions: Ints) -> tuple[Ints, Ints]:
    """The regions sorted, equal ones of several ranks together; and where each set of equal ones begins, and their end."""
    order = np.lexsort(regions[:, ::-1].T)
    regions = regions[order]
    new = np.ones(len(regions), bool)
    new[1:] = (regions[1:, :5] != regions[:-1, :5]).any(1)
    return regions, np.append(np.flatnonzero(new), len(regions))


def _join(held: Ints, group: Ints, wanted: Ints) -> tuple[Ints, Ints]:
    """Ops whose source is relative to the region it comes from, and (first, last) of the regions each can come from."""
    firsts = held[group[:-1]]
    wanted = wanted[np.argsort(wanted[:, 0], kind="stable")]
    begin = np.searchsorted(firsts[:, 0], wanted[:, 0], "left")
    pairs = np.searchsorted(firsts[:, 0], wanted[:, 0], "right") - begin
    d = np.repeat(np.arange(len(wanted)), pairs)
    s = np.arange(len(d)) - np.repeat(np.cumsum(pairs) - pairs, pairs) + begin[d]
    a, b = firsts[s], wanted[d]
    low = np.maximum(a[:, 1:3], b[:, 1:3])
    high = np.minimum(a[:, 1:3] + a[:, 3:5], b[:, 1:3] + b[:, 3:5])
    kept = (high > low).all(1)
    a, b, low, high, s = a[kept], b[kept], low[kept], high[kept], s[kept]
    ops = np.empty((len(a), len(OP)), np.int64)
    ops[:, 0] = 0
    ops[:, 1:3] = low - a[:, 1:3]
    ops[:, 3] = b[:, 5]
    ops[:, 4:6] = b[:, 6:8] + low - b[:, 1:3]
    ops[:, 6:8] = high - low
    return ops, np.stack([group[s], group[s + 1]], 1)


def _prove_written_once(ops: Ints, dest: Catalogue) -> None:
    def both(op: int, pad: int) -> Ints:
        return np.concatenate([ops[:, op], dest.pads[:, pad]])

    cells = cover(Rectangles(both(3, 0), both(4, 1), both(5, 2), both(6, 3), both(7, 4)), dest.params.shape)
    wrong = np.flatnonzero(cells.times != 1)
    if not wrong.size:
        return
    i = int(wrong[0])
    where = f"rows {cells.row[i]}..{cells.row[i] + cells.rows[i]}, columns {cells.col[i]}..{cells.col[i] + cells.cols[i]}"
    times = "never" if cells.times[i] == 0 else f"{cells.times[i]} times"
    raise PlanError(f"{dest.params.title(int(cells.area[i]))} of the destination: {where} would be written {times}")


def _prove_read(source: Catalogue, wanted: Ints, ignore: frozenset[str]) -> None:
    tensors = source.tensors
    cells = cover(Rectangles(wanted[:, 0], wanted[:, 1], wanted[:, 2], wanted[:, 3], wanted[:, 4]), tensors.shape)
    for i in np.flatnonzero(cells.times == 0).tolist():
        name = tensors.names[cells.area[i]]
        if name not in ignore:
            raise PlanError(f"{name}: rows {cells.row[i]}..{cells.row[i] + cells.rows[i]}, columns "
                            f"{cells.col[i]}..{cells.col[i] + cells.cols[i]} go nowhere")  # fmt: skip


def _joined(ops: Ints) -> Ints:
    """Ops that continue each other, on both sides, made one: down the rows, then along the columns. In order of source."""
    source, row, col, dest, dest_row, dest_col, rows, cols = range(8)
    for along, size, at, across, span, at_across in (
        (row, rows, dest_row, col, cols, dest_col), (col, cols, dest_col, row, rows, dest_row),
    ):  # fmt: skip
        order = np.lexsort([ops[:, c] for c in (along, at, span, at_across, across, dest, source)])
        ops = ops[order]
        before, after = ops[:-1], ops[1:]
        follows = (before[:, [source, dest, across, at_across, span]] == after[:, [source, dest, across, at_across, span]]).all(
            1
        )
        follows &= before[:, along] + before[:, size] == after[:, along]
        follows &= before[:, at] + before[:, size] == after[:, at]
        starts = np.flatnonzero(np.append(True, ~follows)) if len(ops) else np.zeros(0, np.int64)
        total = np.add.reduceat(ops[:, size], starts) if len(ops) else np.zeros(0, np.int64)
        ops = ops[starts].copy()
        ops[:, size] = total
    return ops
