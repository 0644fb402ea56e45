"""Who holds what: every rank's parameters, and which regions of which Hugging Face tensors lie where in them.

Tensors and parameters are matrices here: a vector is (n, 1), a stack of experts (experts · rows, cols).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

ITEMSIZE: Mapping[str, int] = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "uint8": 1, "int8": 1,
    "int32": 4, "int64": 8,
}  # fmt: skip
DTYPES = tuple(ITEMSIZE)
REGION = ("tensor", "row", "col", "rows", "cols", "param", "local_row", "local_col")
PAD = ("param", "local_row", "local_col", "rows", "cols")


class PlanError(ValueError):
    """Two catalogues that cannot be joined, or one that contradicts itself; names the tensor or parameter and the ranks."""


@dataclass(frozen=True)
class Tensors:
    """`block` is (rows, cols) of a quantisation block, (1, 1) where there is none."""

    names: tuple[str, ...]
    shape: Ints  # (n, 2)
    dtype: Ints  # (n), index into DTYPES
    block: Ints  # (n, 2)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Params:
    names: tuple[str, ...]
    rank: Ints
    shape: Ints  # (n, 2)
    dtype: Ints

    def __len__(self) -> int:
        return len(self.names)

    @property
    def nbytes(self) -> Ints:
        return self.shape.prod(1) * sizes(self.dtype)

    def title(self, i: int) -> str:
        return f"{self.names[i]} of rank {self.rank[i]}"


@dataclass(frozen=True)
class Catalogue:
    """One side.

    Args:
        regions: (n, 8) of REGION: [row, row + rows) x [col, col + cols) of a tensor lies at (local_row, local_col) of a param.
        pads: (n, 5) of PAD: what of a param no tensor has, as the rows of a padded vocabulary; filled with zeros.
        places: (ranks, 2): node and device of each rank, -1 where unknown; copies within a device are preferred to those
            within a node.
    """

    tensors: Tensors
    params: Params
    regions: Ints
    pads: Ints
    ranks: int
    places: Ints

    def column(self, name: str) -> Ints:
        return self.regions[:, REGION.index(name)]

    def of_rank(self, rank: int) -> Iterator[tuple[int, str]]:
        """(index, name) of a rank's parameters."""
        for i in np.flatnonzero(self.params.rank == rank):
            yield int(i), self.params.names[i]

    def at(self, places: Sequence[tuple[int, int]]) -> Catalogue:
        """The same with its ranks on (node, device)."""
        if len(places) != self.ranks:
            raise PlanError(f"places: expected {self.ranks}, one for each rank, got {len(places)}")
        return replace(self, places=np.asarray(places, np.int64).reshape(-1, 2))

    def rows_sharded(self, count: int) -> Catalogue:
        """Every rank's parameters cut along their rows among `count` ranks, as fully sharded data parallelism does: equal
        shares of ceil(rows / count), the last ones shorter or empty; rank r becomes ranks r · count ... + count - 1."""
        if count < 1:
            raise PlanError(f"count: expected >= 1, got {count}")
        share = -(-self.params.shape[:, 0] // count)
        shapes, ranks, dtypes, regions, pads = [], [], [], [], []
        names: list[str] = []
        number = len(self.params)
        for i in range(count):
            low = np.minimum(share * i, self.params.shape[:, 0])
            high = np.minimum(low + share, self.params.shape[:, 0])
            shapes.append(np.stack([high - low, self.params.shape[:, 1]], 1))
            ranks.append(self.params.rank * count + i)
            names += self.params.names
            dtypes.append(self.params.dtype)
            regions.append(_rows_of(self.regions, 5, 6, 3, 1, low, high, i * number))
            pads.append(_rows_of(self.pads, 0, 1, 3, None, low, high, i * number))
        params = Params(tuple(names), np.concatenate(ranks), np.concatenate(shapes), np.concatenate(dtypes))
        return replace(
            self, params=params, regions=np.concatenate(regions), pads=np.concatenate(pads), ranks=self.ranks * count,
            places=np.repeat(self.places, count, 0),
        )  # fmt: skip


def _rows_of(
    table: Ints, param: int, local: int, rows: int, row: int | None, low: Ints, high: Ints, offset: int
) -> Ints:  # fmt: skip
    """What of a table of regions or pads lies in rows [low, high) of its param, renumbered."""
    begin = np.maximum(table[:, local], low[table[:, param]])
    end = np.minimum(table[:, local] + table[:, rows], high[table[:, param]])
    kept = end > begin
    out = table[kept].copy()
    if row is not None:
        out[:, row] += (begin - table[:, local])[kept]
    out[:, local] = (begin - low[table[:, param]])[kept]
    out[:, rows] = (end - begin)[kept]
    out[:, param] += offset
    return out


def sizes(dtypes: Ints) -> Ints:
    """Bytes of an element."""
    return np.array([ITEMSIZE[d] for d in DTYPES], np.int64)[dtypes]


def dtype_code(name: str, what: str) -> int:
    if name not in ITEMSIZE:
        raise PlanError(f"{what}: expected a dtype of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES.index(name)


def split(what: str, total: int, parts: int, index: int) -> tuple[int, int]:
    """[begin, end) of the index-th of equal parts. The one way anything is shared out here: libraries round a share that
    does not come out even in three different ways, so that is an error."""
    if total % parts:
        raise PlanError(f"{what}: {total} cannot be shared evenly among {parts}")
    share = total // parts
    return index * share, (index + 1) * share


class Builder:
    """Collects a catalogue, one region after another."""

    def __init__(self, ranks: int) -> None:
        if ranks < 1:
            raise PlanError(f"ranks: expected >= 1, got {ranks}")
        self.ranks = ranks
        self.index: dict[str, int] = {}
        self._tensors: list[int] = []  # rows, cols, dtype, block rows, block cols
        self._names: list[str] = []
        self._params: list[int] = []  # rank, rows, cols, dtype
        self._held: set[tuple[int, str]] = set()
        self._regions: list[int] = []
        self._pads: list[int] = []

    def tensor(self, name: str, rows: int, cols: int, dtype: str, block: tuple[int, int] = (1, 1)) -> int:
        """The number of a Hugging Face tensor, which is entered the first time."""
        entry = [rows, cols, dtype_code(dtype, name), *block]
        known = self.index.setdefault(name, len(self.index))
        if known * 5 == len(self._tensors):
            self._tensors += entry
        elif self._tensors[known * 5 : known * 5 + 5] != entry:
            raise PlanError(f"{name}: entered twice, with shapes or dtypes that differ")
        return known

    def param(self, rank: int, name: str, rows: int, cols: int, dtype: str) -> int:
        if not 0 <= rank < self.ranks:
            raise PlanError(f"{name}: expected a rank in [0, {self.ranks}), got {rank}")
        if (rank, name) in self._held:
            raise PlanError(f"{name}: rank {rank} has two parameters of that name")
        self._held.add((rank, name))
        self._names.append(name)
        self._params += [rank, rows, cols, dtype_code(dtype, name)]
        return len(self._names) - 1

    def put(self, tensor: int, row: int, col: int, rows: int, cols: int, param: int, at: int = 0, at_col: int = 0) -> None:
        """[row, row + rows) x [col, col + cols) of a tensor lies at (at, at_col) of a parameter."""
        if rows and cols:
            self._regions += [tensor, row, col, rows, cols, param, at, at_col]

    def pad(self, param: int, row: int, col: int, rows: int, cols: int) -> None:
        if rows and cols:
            self._pads += [param, row, col, rows, cols]

    def build(self) -> Catalogue:
        tensors = np.array(self._tensors, np.int64).reshape(-1, 5)
        params = np.array(self._params, np.int64).reshape(-1, 4)
        return Catalogue(
            Tensors(tuple(self.index), tensors[:, :2], tensors[:, 2], tensors[:, 3:]),
            Params(tuple(self._names), params[:, 0], params[:, 1:3], params[:, 3]),
            np.array(self._regions, np.int64).reshape(-1, len(REGION)),
            np.array(self._pads, np.int64).reshape(-1, len(PAD)),
            self.ranks,
            np.full((self.ranks, 2), -1, np.int64),
        )


def merged(catalogues: Sequence[Catalogue]) -> Catalogue:
    """One catalogue of what each process said of itself: parameters and regions of all, tensors entered once.

    Raises:
        PlanError: two of them disagree on a tensor.
    """
    builder = Builder(max(c.ranks for c in catalogues))
    for c in catalogues:
        numbers = [
            builder.tensor(n, int(s[0]), int(s[1]), DTYPES[d], (int(b[0]), int(b[1])))
            for n, s, d, b in zip(c.tensors.names, c.tensors.shape, c.tensors.dtype, c.tensors.block, strict=True)
        ]
        params = [
            builder.param(int(r), n, int(s[0]), int(s[1]), DTYPES[d])
            for n, r, s, d in zip(c.params.names, c.params.rank, c.params.shape, c.params.dtype, strict=True)
        ]
        for t, row, col, rows, cols, p, at, at_col in c.regions.tolist():
            builder.put(numbers[t], row, col, rows, cols, params[p], at, at_col)
        for p, row, col, rows, cols in c.pads.tolist():
            builder.pad(params[p], row, col, rows, cols)
    out = builder.build()
    places = out.places.copy()
    for c in catalogues:
        for rank in np.unique(c.params.rank):
            places[rank] = c.places[rank]
    return replace(out, places=places)


def to_message(catalogue: Catalogue) -> dict[str, object]:
    """What JSON holds."""
    t, p = catalogue.tensors, catalogue.params
    return {
        "tensors": list(t.names), "tensor_table": np.column_stack([t.shape, t.dtype, t.block]).tolist(),
        "params": list(p.names), "param_table": np.column_stack([p.rank, p.shape, p.dtype]).tolist(),
        "regions": catalogue.regions.tolist(), "pads": catalogue.pads.tolist(), "ranks": catalogue.ranks,
        "places": catalogue.places.tolist(),
    }  # fmt: skip


def from_message(message: Mapping[str, object]) -> Catalogue:
    def table(name: str, width: int) -> Ints:
        return np.array(message[name], np.int64).reshape(-1, width)

    tensors, params = table("tensor_table", 5), table("param_table", 4)
    return Catalogue(
        Tensors(tuple(message["tensors"]), tensors[:, :2], tensors[:, 2], tensors[:, 3:]),  # type: ignore[arg-type]
        Params(tuple(message["params"]), params[:, 0], params[:, 1:3], params[:, 3]),  # type: ignore[arg-type]
        table("regions", len(REGION)), table("pads", len(PAD)), int(message["ranks"]), table("places", 2),  # type: ignore[call-overload]
    )  # fmt: skip
