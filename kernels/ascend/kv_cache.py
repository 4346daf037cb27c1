"""The KV block pool on the device: keys after rope, and values, in blocks that sequences' tables point to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.ascend.device import AscendDevice
from svdengine.kernels.ascend.tensor import Tensor
from svdengine.models import ModelConfig

BLOCK_SIZE = 128  # tokens in a block: what CANN recommends for its paged attention, whose tiles shrink with it


@dataclass(frozen=True)
class KvCache:
    """Keys and values of each layer: (blocks, block_size * kv heads * head_dim) float16."""

    block_size: int  # tokens in a block
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


def kv_bytes_per_token(config: ModelConfig) -> int:
    """Bytes that one token takes in the pool."""
    return 4 * config.layer_count * config.kv_head_count * config.head_dim


def allocate_cache(device: AscendDevice, config: ModelConfig, block_count: int, block_size: int) -> KvCache:
    """An empty pool."""
    shape = (block_count, block_size * config.kv_head_count * config.head_dim)
    keys = tuple(device.zeros(shape, np.float16) for _ in range(config.layer_count))
    return KvCache(block_size, keys, tuple(device.zeros(shape, np.float16) for _ in range(config.layer_count)))


def read_blocks(
    device: AscendDevice, cache: KvCache, config: ModelConfig, blocks: Sequence[int]
) -> NDArray[np.float16]:
    """A copy of blocks, as `BlockStore` has it: (blocks, 2, layers, block_size, kv heads, head_dim)."""
    found = np.empty((len(blocks), *_block_shape(cache, config)), np.float16)
    for index, block in enumerate(blocks):
        for which, pools in enumerate((cache.keys, cache.values)):
            for layer, pool in enumerate(pools):
                found[index, which, layer] = device.read(pool.rows(block, 1)).reshape(found.shape[3:])
    return found


def write_blocks(
    device: AscendDevice, cache: KvCache, config: ModelConfig, blocks: Sequence[int], data: NDArray[Any]
) -> None:
    """Put back what `read_blocks` gave. Raises ValueError for data of another shape or type."""
    expected = (len(blocks), *_block_shape(cache, config))
    if data.shape != expected or data.dtype != np.float16:
        raise ValueError(f"found blocks of {data.dtype} {data.shape}, expected float16 {expected}")
    device.synchronize()  # the last step may still read them
    for index, block in enumerate(blocks):
        for which, pools in enumerate((cache.keys, cache.values)):
            for layer, pool in enumerate(pools):
                device.write(pool.rows(block, 1), data[index, which, layer])


def _block_shape(cache: KvCache, config: ModelConfig) -> tuple[int, ...]:
    return 2, config.layer_count, cache.block_size, config.kv_head_count, config.head_dim
