"""Which blocks of the cache are free, and how many sequences share each of the others."""

from __future__ import annotations


class BlockManager:
    def __init__(self, blocks: int) -> None:
        self._free = list(range(blocks - 1, -1, -1))  # the lowest first
        self._holders = [0] * blocks

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        block = self._free.pop()
        self._holders[block] = 1
        return block

    def share(self, block: int) -> int:
        self._holders[block] += 1
        return block

    def release(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free.append(block)
