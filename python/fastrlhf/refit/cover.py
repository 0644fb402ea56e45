"""How many of a set of rectangles cover each point of the areas they lie in: the planner's proofs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .catalogue import Ints


class Rectangles(NamedTuple):
    """[row, row + rows) x [col, col + cols) of the area-th area, each (n)."""

    area: Ints
    row: Ints
    col: Ints
    rows: Ints
    cols: Ints


class Cells(NamedTuple):
    """The areas cut at every edge of a rectangle in them: which area, where each cell is, how many rectangles cover it."""

    area: Ints
    row: Ints
    col: Ints
    rows: Ints
    cols: Ints
    times: Ints


def cover(rectangles: Rectangles, shape: Ints) -> Cells:
    """Counts by differences: +1 and -1 at a rectangle's corners, summed along both directions over coordinates compressed to
    the edges that occur, of all areas in one array. `shape` (areas, 2)."""
    area, row, col, rows, cols = rectangles
    every = np.arange(len(shape))
    zero = np.zeros_like(every)
    at_row, row_key, row_of = _edges(np.concatenate([area, area, every, every]),
                                     np.concatenate([row, row + rows, zero, shape[:, 0]]), len(shape))  # fmt: skip
    at_col, col_key, col_of = _edges(np.concatenate([area, area, every, every]),
                                     np.concatenate([col, col + cols, zero, shape[:, 1]]), len(shape))  # fmt: skip
    n = len(area)
    first_row, first_col = row_of[:-1], col_of[:-1]
    heights, widths = np.diff(row_of), np.diff(col_of)
    base = np.concatenate([[0], np.cumsum(heights * widths)])
    top, bottom = at_row[:n] - first_row[area], at_row[n : 2 * n] - first_row[area]
    left, right = at_col[:n] - first_col[area], at_col[n : 2 * n] - first_col[area]
    origin, width = base[area], widths[area]
    total = int(base[-1])
    count = np.bincount(np.concatenate([origin + top * width + left, origin + bottom * width + right]), minlength=total)
    count = count - np.bincount(np.concatenate([origin + top * width + right, origin + bottom * width + left]), minlength=total)
    count = np.cumsum(count)  # along columns: every row sums to 0, so one row does not reach into the next
    cell_area = np.repeat(every, heights * widths)
    within = np.arange(total) - base[cell_area]
    i, j = within // widths[cell_area], within % widths[cell_area]
    turned = base[cell_area] + j * heights[cell_area] + i  # the same grid, column after column
    by_column = np.empty_like(count)
    by_column[turned] = count
    count = np.cumsum(by_column)[turned]
    inside = (i < heights[cell_area] - 1) & (j < widths[cell_area] - 1)
    cell_area, i, j, count = cell_area[inside], i[inside], j[inside], count[inside]
    r, c = first_row[cell_area] + i, first_col[cell_area] + j
    return Cells(cell_area, row_key[r], col_key[c], row_key[r + 1] - row_key[r], col_key[c + 1] - col_key[c], count)


def _edges(area: Ints, at: Ints, areas: int) -> tuple[Ints, Ints, Ints]:
    """(number of each edge among the distinct ones, their coordinates, where each area's begin)."""
    span = int(at.max(initial=0)) + 1
    keys, number = np.unique(area * span + at, return_inverse=True)
    owner, coordinate = keys // span, keys % span
    return number.reshape(-1), coordinate, np.searchsorted(owner, np.arange(areas + 1))
