"""How long a sequence may become, and how many KV blocks there are."""

from __future__ import annotations

from svdengine.errors import RequestError
from svdengine.kernels.batch import BLOCK_SIZE
from svdengine.models.config import ModelConfig
from svdengine.sequence import blocks_for

DEFAULT_CONTEXT = 4096  # tokens, where the model was made for more


def context_limit(config: ModelConfig, context: int | None) -> int:
    """Most tokens of one sequence: `context`, or by default what the model was made for. Raises RequestError."""
    if context is None:
        return min(config.max_position, DEFAULT_CONTEXT)
    if isinstance(context, bool) or not isinstance(context, int) or context < 2:
        raise RequestError(f"context must be a whole number of at least 2 tokens, found {context!r}")
    if context > config.max_position:
        raise RequestError(f"the model was made for a context of {config.max_position} tokens, found {context}")
    return context


def pool_blocks(context: int, kv_tokens: int | None, kv_memory: int | None, token_bytes: int) -> int:
    """Blocks of a KV pool that holds so many tokens, or fills so many bytes. Raises RequestError."""
    if kv_memory is None:
        if isinstance(kv_tokens, bool) or not isinstance(kv_tokens, int) or kv_tokens < context:
            raise RequestError(f"kv_tokens must be at least the context of {context}, found {kv_tokens}")
        return blocks_for(kv_tokens)
    if kv_tokens is not None:
        raise RequestError("give the size of the KV cache as kv_tokens or as kv_memory, not as both")
    if isinstance(kv_memory, bool) or not isinstance(kv_memory, int):
        raise RequestError(f"kv_memory must be a whole number of bytes, found {kv_memory!r}")
    blocks = kv_memory // (token_bytes * BLOCK_SIZE)
    if blocks < blocks_for(context):
        needed = blocks_for(context) * BLOCK_SIZE * token_bytes
        raise RequestError(
            f"kv_memory must hold a context of {context} tokens, which takes {needed / 2**20:.1f} MiB,"
            f" found {kv_memory / 2**20:.1f} MiB; use more, or a smaller context"
        )
    return blocks
