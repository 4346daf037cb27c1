"""The prefix cache: KV blocks of sequences that ended, for the next prompt that begins with the same tokens."""

from __future__ import annotations

from collections.abc import Sequence as TokenIds
from dataclasses import dataclass

from svdengine.block_pool import BlockPool
from svdengine.kernels.batch import BLOCK_SIZE
from svdengine.sequence import blocks_for


@dataclass(frozen=True)
class CachedPrefix:
    """Tokens and the blocks that hold their keys and values."""

    tokens: tuple[int, ...]
    blocks: tuple[int, ...]
    sparsity_bias: float = 0.0  # that they were computed with


class PrefixCache:
    """A few entries, the least recently used first. An entry is one owner of each of its blocks."""

    def __init__(self, pool: BlockPool, capacity: int = 4) -> None:
        self._pool = pool
        self._capacity = capacity
        self._entries: list[CachedPrefix] = []

    def __len__(self) -> int:
        return len(self._entries)

    def take(self, tokens: TokenIds[int], sparsity_bias: float = 0.0) -> tuple[list[int], int]:
        """Blocks that hold a prefix of `tokens`, which the caller owns from now on, and the length of that prefix.

        At least one token is left out, since its logits are wanted. A conversation that goes on takes its entry whole;
        a prompt that shares only the beginning shares the full blocks and leaves the entry.
        """
        best, length = None, 0
        for entry in self._entries:
            common = min(_common_prefix(entry.tokens, tokens), len(tokens) - 1)
            if common >= max(length, 1) and entry.sparsity_bias == sparsity_bias:
                best, length = entry, common
        if best is None:
            return [], 0
        if 2 * length < len(best.tokens):
            length = length // BLOCK_SIZE * BLOCK_SIZE
            shared = list(best.blocks[: blocks_for(length)])
            self._pool.share(shared)
            return shared, length
        self._entries.remove(best)
        if length % BLOCK_SIZE and self._pool.owner_count(best.blocks[length // BLOCK_SIZE]) > 1:
            length = length // BLOCK_SIZE * BLOCK_SIZE  # the block would be written to, and another reads it
        count = blocks_for(length)
        self._pool.release(best.blocks[count:])
        return list(best.blocks[:count]), length

    def store(self, tokens: TokenIds[int], blocks: TokenIds[int], sparsity_bias: float = 0.0) -> None:
        """Keep the blocks of `tokens`, which the cache owns from now on. Blocks past the tokens are released."""
        count = blocks_for(len(tokens))
        self._pool.release(blocks[count:])
        if not tokens or not self._capacity:
            self._pool.release(blocks[:count])
            return
        self._entries.append(CachedPrefix(tuple(tokens), tuple(blocks[:count]), sparsity_bias))
        if len(self._entries) > self._capacity:
            self.evict()

    def evict(self) -> bool:
        """Release the blocks of the entry that was not used for longest. False when there is none."""
        if not self._entries:
            return False
        self._pool.release(self._entries.pop(0).blocks)
        return True

    def clear(self) -> None:
        """Release everything."""
        while self.evict():
            pass


def _common_prefix(a: TokenIds[int], b: TokenIds[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
