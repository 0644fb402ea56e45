"""Two disjoint parts of rows, to train on and to hold out."""

from __future__ import annotations

from .order import Order
from .rows import Chosen, Rows


def split(rows: Rows, held_out: int | float, seed: int) -> tuple[Rows, Rows]:
    """(train, held-out): disjoint, together all rows, the same for the same seed; views in O(1) memory.

    held_out: an int is a number of rows, a float in (0, 1) a share, rounded, of at least one row.
    ValueError where either part would be empty.
    """
    if isinstance(held_out, bool) or not isinstance(held_out, (int, float)):
        raise TypeError(f"held_out: expected an int or a float, got {type(held_out).__name__}")
    if isinstance(held_out, float) and not 0 < held_out < 1:
        raise ValueError(f"held_out: a share is in (0, 1), got {held_out}; a number of rows is an int")
    count = held_out if isinstance(held_out, int) else max(1, round(held_out * len(rows)))
    if not 0 < count < len(rows):
        raise ValueError(f"held_out: {held_out} of the {len(rows)} rows of {rows.name} leaves a part empty")
    order = Order(len(rows), seed)
    held = Chosen(rows, lambda i: order[i], count, f"{rows.name} (held out)")
    train = Chosen(rows, lambda i: order[count + i], len(rows) - count, f"{rows.name} (train)")
    return train, held
