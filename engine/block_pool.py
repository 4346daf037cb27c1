"""The KV block pool: which blocks are free, and how many owners each of the others has."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from svdengine.errors import ContextOverflowError


class BlockPool:
    """Bookkeeping only: the keys and values themselves live in the executor."""

    def __init__(self, block_count: int) -> None:
        if block_count < 1:
            raise ValueError(f"a pool needs at least one block, found {block_count}")
        self.block_count = block_count
        self._free = deque(range(block_count))
        self._owners = [0] * block_count  # reference count of each block

    @property
    def free_count(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free)

    def can_allocate(self, count: int) -> bool:
        """Whether `count` blocks are free."""
        return count <= len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, each with one owner. Raises ContextOverflowError if there are fewer."""
        if not self.can_allocate(count):
            raise ContextOverflowError(
                f"{count} KV blocks are needed and {self.free_count} of {self.block_count} are free; "
                "use a larger context, or fewer sequences at a time"
            )
        blocks = [self._free.popleft() for _ in range(count)]
        for block in blocks:
            self._owners[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add an owner to blocks that are in use."""
        for block in blocks:
            if self._owners[block] < 1:
                raise ValueError(f"block {block} is free and cannot be shared")
            self._owners[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Drop one owner of each block; a block without owners is free again."""
        for block in blocks:
            if self._owners[block] < 1:
                raise ValueError(f"block {block} is free already")
            self._owners[block] -= 1
            if not self._owners[block]:
                self._free.append(block)

    def owner_count(self, block: int) -> int:
        """How many sequences and cache entries own the block."""
        return self._owners[block]
