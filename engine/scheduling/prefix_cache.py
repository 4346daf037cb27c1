"""The prefix cache: which KV block holds which tokens, so that sequences that begin alike share their blocks.

A full block is known by a digest of its tokens and of the digest of the block before it, so that one look-up compares
the whole prefix. The digests are cryptographic: no two prefixes that can be found have the same, and tokens need not be
compared. Blocks are shared while they are in use, and stay known without owners until the pool gives them out anew.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Iterable
from collections.abc import Sequence as TokenIds
from dataclasses import dataclass

from svdengine.kernels.executor import FfnMode
from svdengine.scheduling.block_pool import BlockPool
from svdengine.scheduling.sequence import Sequence

_DIGEST_BYTES = 32


@dataclass(frozen=True)
class CachedBlock:
    """A block whose content is known."""

    block: int
    parent: bytes  # digest of the block before it, or `root_digest`
    digest: bytes
    tokens: tuple[int, ...]  # fewer than a block has room for in the last one of a sequence that ended
    sparsity_bias: float  # that it was computed with, and all blocks before it


class PrefixCache:
    """The known blocks of a pool. All blocks of sequences are taken and given back here.

    With `enabled` false it knows none.
    """

    def __init__(self, pool: BlockPool, *, enabled: bool = True) -> None:
        self._pool = pool
        self._block_size = pool.block_size
        self._enabled = enabled
        self._full: dict[bytes, CachedBlock] = {}  # by digest
        self._tails: dict[bytes, CachedBlock] = {}  # blocks that are not full, by parent
        self._known: dict[int, CachedBlock] = {}  # all of them, by block

    def __len__(self) -> int:
        """Blocks whose content is known."""
        return len(self._known)

    def allocate(self, count: int) -> list[int]:
        """Take blocks from the pool; what idle ones held is forgotten. Raises ContextOverflowError."""
        blocks = self._pool.allocate(count)
        for block in blocks:
            self._forget(block)
        return blocks

    def extend(self, sequence: Sequence) -> int:
        """Give a sequence the known blocks that hold what comes after its cached tokens; returns how many tokens.

        At least one token stays pending, since its logits are wanted. Blocks that the sequence had for them are
        released. A block that is not full is taken out of the cache, because the sequence will write to it; so this
        is done only where at least half of what it holds is wanted.
        """
        if not self._enabled or sequence.every_row:
            return 0
        before, limit = sequence.cached, len(sequence) - 1
        size = self._block_size
        while (len(sequence.digests) + 1) * size <= limit:
            found = self._full.get(_next_digest(sequence, size))
            if found is None:
                break
            self._place(found.block, sequence)
            sequence.digests.append(found.digest)
            sequence.cached = len(sequence.digests) * size
        if sequence.cached % size == 0:
            self._extend_by_tail(sequence, limit)
        return sequence.cached - before

    def register(self, sequence: Sequence) -> None:
        """Make the sequence's blocks known that are full by now. One that is known already replaces its own."""
        if not self._enabled or sequence.every_row:
            return
        size = self._block_size
        while (len(sequence.digests) + 1) * size <= sequence.cached:
            digest, at = _next_digest(sequence, size), len(sequence.digests)
            found = self._full.get(digest)
            if found is None:
                self._add(_block_of(sequence, digest, sequence.block_table[at], size, size))
            elif found.block != sequence.block_table[at]:
                self._place(found.block, sequence)
            sequence.digests.append(digest)

    def retire(self, sequence: Sequence) -> None:
        """Take back all blocks of a sequence, which holds nothing afterwards. What they hold stays known."""
        size = self._block_size
        count = sequence.cached % size
        if self._enabled and not sequence.every_row and count:
            block = sequence.block_table[sequence.cached // size]
            self._add(_block_of(sequence, b"", block, count, size))
        self.release(reversed(sequence.block_table))  # the last is given out first: others build on those before it
        sequence.block_table, sequence.digests, sequence.cached = [], [], 0

    def contents(self) -> list[CachedBlock]:
        """All that can be found, each block after its parent, and what was used last first.

        But for blocks of requests that chose a path of FFNs themselves.
        """
        placed: dict[int, CachedBlock] = {}
        owned = [block for block in self._known if self._pool.owner_count(block)]
        for block in (*owned, *reversed(self._pool.idle_blocks)):
            root, lineage = root_digest(self._known[block].sparsity_bias), []
            known: CachedBlock | None = self._known[block]
            while known is not None and known.block not in placed:
                lineage.append(known)
                if known.parent == root:
                    break
                known = self._full.get(known.parent)
            if known is not None:  # else one that it builds on is gone
                placed |= {before.block: before for before in reversed(lineage)}
        return list(placed.values())

    def claim(self, parent: bytes, tokens: TokenIds[int], sparsity_bias: float) -> CachedBlock | None:
        """A blank block for content from elsewhere, which the caller owns until `keep`.

        None when that content is known already, or no block is blank.
        """
        full = len(tokens) == self._block_size
        digest = block_digest(parent, tokens) if full else b""
        if not self._enabled or not self._pool.blank_count or (digest in self._full if full else parent in self._tails):
            return None
        return CachedBlock(self._pool.allocate(1)[0], parent, digest, tuple(tokens), sparsity_bias)

    def keep(self, claimed: TokenIds[CachedBlock]) -> None:
        """Make claimed blocks known, whose content is in place now, and give them back: the first as used last."""
        for known in claimed:
            self._add(known)
        self.release(known.block for known in reversed(claimed))

    def release(self, blocks: Iterable[int]) -> None:
        """Drop one owner of each block."""
        self._pool.release(blocks, self._known)

    def clear(self) -> None:
        """Forget everything."""
        for block in list(self._known):
            self._forget(block)

    def _extend_by_tail(self, sequence: Sequence, limit: int) -> None:
        tail = self._tails.get(_parent(sequence))
        if tail is None:
            return
        same = _common_prefix(tail.tokens, sequence.tokens[sequence.cached : limit])
        if 2 * same < len(tail.tokens):
            return
        self._place(tail.block, sequence)
        self._forget(tail.block)
        sequence.cached += same

    def _place(self, block: int, sequence: Sequence) -> None:
        """Make a known block the sequence's next one after those that have digests."""
        self._pool.share(block)
        at = len(sequence.digests)
        self.release(sequence.block_table[at : at + 1])
        sequence.block_table[at : at + 1] = [block]

    def _add(self, found: CachedBlock) -> None:
        if len(found.tokens) == self._block_size:
            self._full[found.digest] = found
        else:
            if found.parent in self._tails:
                self._forget(self._tails[found.parent].block)
            self._tails[found.parent] = found
        self._known[found.block] = found

    def _forget(self, block: int) -> None:
        known = self._known.pop(block, None)
        if known is None:
            return
        if len(known.tokens) == self._block_size:
            del self._full[known.digest]
        else:
            del self._tails[known.parent]
        self._pool.blank(block)


def root_digest(sparsity_bias: float, ffn: FfnMode | None = None) -> bytes:
    """What the first block of a sequence has for a parent: all that keys and values depend on besides tokens."""
    return hashlib.blake2b(struct.pack("<d", sparsity_bias) + (ffn or "").encode(), digest_size=_DIGEST_BYTES).digest()


def block_digest(parent: bytes, tokens: TokenIds[int]) -> bytes:
    """The digest of a full block: of its tokens, and by way of `parent` of all before them."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=_DIGEST_BYTES).digest()


def _parent(sequence: Sequence) -> bytes:
    return sequence.digests[-1] if sequence.digests else root_digest(sequence.sparsity_bias, sequence.ffn)


def _next_digest(sequence: Sequence, size: int) -> bytes:
    """Of the first block, of `size` tokens, that has none yet."""
    start = len(sequence.digests) * size
    return block_digest(_parent(sequence), sequence.tokens[start : start + size])


def _block_of(sequence: Sequence, digest: bytes, block: int, count: int, size: int) -> CachedBlock:
    """The sequence's first block without a digest, of which `count` tokens of `size` are cached."""
    start = len(sequence.digests) * size
    tokens = tuple(sequence.tokens[start : start + count])
    return CachedBlock(block, _parent(sequence), digest, tokens, sequence.sparsity_bias)


def _common_prefix(a: TokenIds[int], b: TokenIds[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
