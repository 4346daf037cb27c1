"""The KV block pool: how many owners each block has, and which one is given out next."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Container, Iterable

from svdengine.errors import ContextOverflowError


class BlockPool:
    """Bookkeeping only: the keys and values themselves live in the executor.

    A block has owners, or it is blank, or it is idle: nobody owns it, but what it holds may be of use again. Blank
    blocks are given out first, then the one that has been idle for longest.
    """

    def __init__(self, block_count: int) -> None:
        if block_count < 1:
            raise ValueError(f"a pool needs at least one block, found {block_count}")
        self.block_count = block_count
        self._blank = deque(range(block_count))
        self._idle: OrderedDict[int, None] = OrderedDict()  # the first has been idle for longest
        self._owners = [0] * block_count  # reference count of each block

    @property
    def free_count(self) -> int:
        """Blocks that nobody owns."""
        return len(self._blank) + len(self._idle)

    @property
    def blank_count(self) -> int:
        """Of those, blocks that hold nothing of use."""
        return len(self._blank)

    @property
    def idle_blocks(self) -> list[int]:
        """Of those, the others, the one that has been idle for longest first."""
        return list(self._idle)

    @property
    def idle_count(self) -> int:
        """How many those are."""
        return len(self._idle)

    def can_allocate(self, count: int) -> bool:
        """Whether nobody owns `count` blocks."""
        return count <= self.free_count

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, each with one owner. Raises ContextOverflowError if fewer are free."""
        if not self.can_allocate(count):
            raise ContextOverflowError(
                f"{count} KV blocks are needed and {self.free_count} of {self.block_count} are free; "
                "use a larger context, or fewer sequences at a time"
            )
        blocks = [self._blank.popleft() if self._blank else self._idle.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._owners[block] = 1
        return blocks

    def share(self, block: int) -> None:
        """Add an owner to a block that is in use or idle."""
        if self._owners[block] < 1:
            if block not in self._idle:
                raise ValueError(f"block {block} is blank and cannot be shared")
            del self._idle[block]
        self._owners[block] += 1

    def release(self, blocks: Iterable[int], kept: Container[int] = ()) -> None:
        """Drop one owner of each block. Blocks without owners become idle if they are among `kept`, else blank."""
        for block in blocks:
            if self._owners[block] < 1:
                raise ValueError(f"block {block} is free already")
            self._owners[block] -= 1
            if self._owners[block]:
                continue
            if block in kept:
                self._idle[block] = None
            else:
                self._blank.append(block)

    def blank(self, block: int) -> None:
        """Note that what a block holds is of no use: if it is idle, it is blank from now on."""
        if block in self._idle:
            del self._idle[block]
            self._blank.append(block)

    def owner_count(self, block: int) -> int:
        """How many sequences own the block."""
        return self._owners[block]
