"""In which order rows are taken: a permutation computed index by index, and a stream that walks it and resumes."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from .rows import DataError, Row, Rows

ROUNDS = 8
MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    """splitmix64's finaliser (Steele et al. 2014): a bijection of 64 bits in which every bit depends on every other."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


class Order:
    """A pseudo-random order of 0 ... length - 1 for every epoch, in O(1) memory.

    `order[k]` is the row at global position k >= 0, of epoch k // length; each epoch has its own permutation. The
    same seed gives the same order on every machine and version. With `shuffle=False`, `order[k] = k % length`.

    The permutation is a Feistel network on the fewest bits that hold length - 1; an index that falls outside
    [0, length) is put through again until it falls inside (cycle walking, Black and Rogaway 2002; under two
    passes on average). ValueError for a length < 1, TypeError where length or seed is no integer,
    IndexError for a position < 0.
    """

    def __init__(self, length: int, seed: int, shuffle: bool = True) -> None:
        self.length, self.seed, self.shuffle = operator.index(length), operator.index(seed), bool(shuffle)
        if length < 1:
            raise ValueError(f"length: expected at least 1, got {length}")
        bits = max(2, (length - 1).bit_length())
        self._low_bits = bits // 2
        self._low, self._high = (1 << self._low_bits) - 1, (1 << (bits - self._low_bits)) - 1
        self._cached: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> int:
        if position < 0:
            raise IndexError(f"position: expected at least 0, got {position}")
        epoch, index = divmod(position, self.length)
        if not self.shuffle:
            return index
        cached, keys = self._cached
        if cached != epoch:
            keys = self._keys_of(epoch)
            self._cached = epoch, keys
        index = self._permute(index, keys)
        while index >= self.length:
            index = self._permute(index, keys)
        return index

    def _keys_of(self, epoch: int) -> list[int]:
        state = _mix(_mix(self.seed & MASK) ^ _mix(epoch + 0x9E3779B97F4A7C15 & MASK))
        return [_mix(state + (i + 1) * 0x9E3779B97F4A7C15 & MASK) for i in range(ROUNDS)]

    def _permute(self, index: int, keys: list[int]) -> int:
        high, low = index >> self._low_bits, index & self._low
        for i in range(0, ROUNDS, 2):
            high ^= _mix(low ^ keys[i]) & self._high
            low ^= _mix(high ^ keys[i + 1]) & self._low
        return high << self._low_bits | low


class Stream:
    """Rows in an endless order, epoch after epoch; saves and restores where it stands.

    position: how many rows have been taken, over all shards if there are several.
    epoch: position // len(rows).
    """

    def __init__(self, rows: Rows, seed: int, shuffle: bool = True) -> None:
        if not len(rows):
            raise DataError(f"{rows.name}: no rows to take")
        self.rows, self.position = rows, 0
        self.rank, self.world = 0, 1
        self._order = Order(len(rows), seed, shuffle)

    @property
    def epoch(self) -> int:
        return self.position // len(self.rows)

    def shard(self, rank: int, world: int) -> Stream:
        """A stream of every world-th row from here on: the shards are disjoint and together take every row of an epoch."""
        if not 0 <= rank < world or self.world != 1:
            raise ValueError(f"rank, world: expected 0 <= rank < world of an undivided stream, got {rank}, {world}")
        shard = Stream(self.rows, self._order.seed, self._order.shuffle)
        shard.position, shard.rank, shard.world = self.position, rank, world
        return shard

    def indices(self, n: int) -> list[int]:
        """The indices of the next n rows, which are taken."""
        if n < 0:
            raise ValueError(f"n: expected at least 0, got {n}")
        first, self.position = self.position, self.position + n * self.world
        return [self._order[k] for k in range(first + self.rank, self.position + self.rank, self.world)]

    def next(self, n: int) -> list[tuple[int, Row]]:
        """The next n rows, each with its index in `rows`. Where a row is broken, DataError, and none is taken."""
        before = self.position
        try:
            return [(i, self.rows[i]) for i in self.indices(n)]
        except BaseException:
            self.position = before
            raise

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers. In lockstep, shards have the same state, and one saved of `world` shards can be loaded into others."""
        return {
            "position": self.position,
            "seed": self._order.seed,
            "shuffle": self._order.shuffle,
            "length": len(self.rows),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where the state was saved. ValueError, and nothing changed, where it is of other rows or another order."""
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise ValueError(f"state of the data stream {self.rows.name}: no {sorted(missing)}; it has {sorted(state)}")
        for key, own in self.state_dict().items():
            if key != "position" and state[key] != own:
                raise ValueError(f"state of the data stream {self.rows.name}: saved with {key} {state[key]}, opened with {own}")
        if not isinstance(state["position"], int) or state["position"] < 0:
            raise ValueError(f"state of the data stream {self.rows.name}: position {state['position']!r}")
        self.position = state["position"]
