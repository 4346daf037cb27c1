"""The KV block pool: how many owners each block has, and which one is given out next."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Container, Iterable
from dataclasses import replace

from svdengine.errors import ContextOverflowError, RequestError, shown
from svdengine.kernels.batch import BLOCK_SIZE
from svdengine.kernels.kv_q8 import GROUP, group_count
from svdengine.models.config import ModelConfig
from svdengine.scheduling.numbers import check_integer
from svdengine.scheduling.sequence import blocks_for


class BlockPool:
    """Bookkeeping only: the keys and values themselves live in the executor.

    A block has owners, or it is blank, or it is idle: nobody owns it, but what it holds may be of use again. Blank
    blocks are given out first, then the one that has been idle for longest.
    """

    def __init__(self, block_count: int, block_size: int = BLOCK_SIZE) -> None:
        if block_count < 1:
            raise ValueError(f"a pool needs at least one block, found {block_count}")
        self.block_count = block_count
        self.block_size = block_size  # tokens in a block
        self._blank = deque(range(block_count))
        self._idle: OrderedDict[int, None] = OrderedDict()  # the first has been idle for longest
        self._owners = [0] * block_count  # reference count of each block

    def blocks_for(self, token_count: int) -> int:
        """Blocks that hold `token_count` tokens."""
        return blocks_for(token_count, self.block_size)

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


MOST_MEMORY = 1 << 46  # bytes that anyone may ask for
DEFAULT_CONTEXT = 4096  # tokens, where the model was made for more


def context_limit(config: ModelConfig, context: int | None) -> int:
    """Most tokens of one sequence: `context`, or by default what the model was made for. Raises RequestError."""
    if context is None:
        return min(config.max_position, DEFAULT_CONTEXT)
    if isinstance(context, bool) or not isinstance(context, int) or context < 2:
        raise RequestError(f"context must be a whole number of at least 2 tokens, found {shown(context)}")
    if context > config.max_position:
        raise RequestError(f"the model was made for a context of {config.max_position} tokens, found {shown(context)}")
    return context


def pool_blocks(context: int, kv_tokens: int | None, kv_memory: int | None, token_bytes: int) -> int:
    """Blocks of a KV pool that holds so many tokens, or fills so many bytes. Raises RequestError."""
    if kv_memory is None:
        if isinstance(kv_tokens, bool) or not isinstance(kv_tokens, int) or kv_tokens < context:
            raise RequestError(f"kv_tokens must be at least the context of {context}, found {shown(kv_tokens)}")
        check_integer("kv_tokens", kv_tokens, context, MOST_MEMORY // token_bytes)
        return blocks_for(kv_tokens)
    if kv_tokens is not None:
        raise RequestError("give the size of the KV cache as kv_tokens or as kv_memory, not as both")
    if isinstance(kv_memory, bool) or not isinstance(kv_memory, int):
        raise RequestError(f"kv_memory must be a whole number of bytes, found {shown(kv_memory)}")
    check_integer("kv_memory", kv_memory, 0, MOST_MEMORY)
    blocks = kv_memory // (token_bytes * BLOCK_SIZE)
    if blocks < blocks_for(context):
        needed = blocks_for(context) * BLOCK_SIZE * token_bytes
        raise RequestError(
            f"kv_memory must hold a context of {context} tokens, which takes {needed / 2**20:.1f} MiB,"
            f" found {kv_memory / 2**20:.1f} MiB; use more, or a smaller context"
        )
    return blocks


def kv_bytes_per_token(config: ModelConfig, kv_dtype: str = "f16") -> int:
    """Bytes of keys and values that one token adds to the KV cache."""
    heads, head_dim = 2 * config.layer_count * config.kv_head_count, config.head_dim
    if kv_dtype == "q8":
        return heads * (head_dim + 2 * group_count(head_dim))
    return heads * head_dim * (2 if kv_dtype == "f16" else 4)


def kv_pool_bytes_per_token(config: ModelConfig, kv_dtype: str = "f16") -> int:
    """Bytes that a token takes in the KV pool of any executor, at most: a head's vectors are padded to 16 items.

    In 8 bits keys are padded to whole groups, and the scales of a block to a cache line.
    """
    if kv_dtype == "q8":
        groups = group_count(config.head_dim)
        key, value, scales = GROUP * groups, -(-config.head_dim // 16) * 16, -(-groups // 2) * 4
        return config.layer_count * config.kv_head_count * (key + value + 2 * scales)
    return kv_bytes_per_token(replace(config, head_dim=-(-config.head_dim // 16) * 16), kv_dtype)


def kv_read_bytes(config: ModelConfig, context: float, kv_dtype: str = "f16") -> float:
    """Bytes of KV cache that decoding one token reads when `context` tokens are cached; a sliding window reads less."""
    layer = kv_bytes_per_token(config, kv_dtype) / config.layer_count
    windowed = len(config.sliding_window_layers) if config.sliding_window else 0
    return layer * (
        (config.layer_count - windowed) * context + windowed * min(context, config.sliding_window or context)
    )
