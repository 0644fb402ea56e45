"""Which of several ranks that hold the same region sends it."""

from __future__ import annotations

import numpy as np

from .catalogue import Ints


def choose(candidates: Ints, rank: Ints, places: Ints, dest: Ints, nbytes: Ints) -> Ints:
    """One of each op's candidates.

    The nearest (on the destination's device, then on its node) come first; among equals bytes are spread so that the ranks'
    loads come out as level as they can.

    Args:
        candidates: (n, 2) [first, end) in the table of regions.
        rank: (regions) of their ranks.
        places: (ranks, 2) node and device.
        dest: (n, 2) where each op goes.
        nbytes: (n).
    """
    first, count = candidates[:, 0], candidates[:, 1] - candidates[:, 0]
    out = first.copy()
    load = np.zeros(len(places))
    only = count == 1
    np.add.at(load, rank[first[only]], nbytes[only])
    several = np.flatnonzero(~only)
    if not several.size:
        return out
    width = int(count[several].max())
    region = first[several, None] + np.minimum(np.arange(width), count[several, None] - 1)
    holder = rank[region]
    near, device = ((places[holder, i] == dest[several, None, i]) & (places[holder, i] >= 0) for i in (0, 1))
    distance = np.where(near, np.where(device, 0, 1), 2)
    allowed = (distance == distance.min(1, keepdims=True)) & (np.arange(width) < count[several, None])
    # sets of ranks by a sum of random words: equal sets are equal sums
    words = np.random.default_rng(0).integers(1, 2**62, len(places))
    keys, inverse = np.unique(np.where(allowed, words[holder], 0).sum(1), return_inverse=True)
    inverse = inverse.reshape(-1)
    sets = np.bincount(inverse, minlength=len(keys))
    leader = np.zeros(len(keys), np.int64)
    leader[inverse] = np.arange(len(several))
    for key in np.lexsort([sets, allowed.sum(1)[leader]]):
        members = np.flatnonzero(inverse == key)
        members = members[np.argsort(-nbytes[several[members]], kind="stable")]  # large ones first
        ranks = np.unique(holder[leader[key]][allowed[leader[key]]])
        ends = np.cumsum(_water(load[ranks], float(nbytes[several[members]].sum())))
        cumulated = np.cumsum(nbytes[several[members]])
        middle = cumulated - nbytes[several[members]] / 2
        winner = ranks[np.minimum(np.searchsorted(ends, middle, "right"), len(ranks) - 1)]
        slot = np.argmax((holder[members] == winner[:, None]) & allowed[members], 1)
        out[several[members]] = region[members, slot]
        np.add.at(load, winner, nbytes[several[members]])
    return out


def _water(load: np.ndarray, amount: float) -> np.ndarray:
    """How much of `amount` each gets so that the lowest loads rise to one level."""
    order = np.argsort(load)
    level = load[order]
    n = np.arange(1, len(load) + 1)
    needed = level * n - np.cumsum(level)  # to raise the n lowest to the n-th
    k = int(np.searchsorted(needed, amount, "right"))
    height = (amount + level[:k].sum()) / k
    return np.maximum(0.0, height - load)
