"""The KV block pool on the device: keys after rope, and values, in blocks that sequences' tables point to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.batch import BLOCK_SIZE
from svdengine.kernels.cuda.device import Array, Device
from svdengine.kernels.executor import KvDtype
from svdengine.models import ModelConfig


@dataclass(frozen=True)
class KvCache:
    """Keys and values, each [layer][block][kv head][BLOCK_SIZE][head_stride], of one type."""

    keys: tuple[Array, ...]  # of each layer, flat, float16 or float32
    values: tuple[Array, ...]
    dtype: KvDtype
    head_stride: int  # items of a head's vector: head_dim, padded to 16 bytes


def head_stride(head_dim: int) -> int:
    """Items that a key or value takes."""
    return -(-head_dim // 8) * 8


def kv_bytes_per_token(config: ModelConfig, dtype: KvDtype) -> int:
    """Bytes that one token takes in the pool."""
    items = 2 * config.layer_count * config.kv_head_count * head_stride(config.head_dim)
    return items * (2 if dtype == "f16" else 4)


def allocate_cache(device: Device, config: ModelConfig, block_count: int, dtype: KvDtype) -> KvCache:
    """An empty pool of `block_count` blocks."""
    stride = head_stride(config.head_dim)
    items, kind = block_count * BLOCK_SIZE * config.kv_head_count * stride, _numpy_type(dtype)

    def pool() -> tuple[Array, ...]:
        return tuple(device.zeros(items, kind) for _ in range(config.layer_count))

    return KvCache(pool(), pool(), dtype, stride)


def read_blocks(device: Device, cache: KvCache, config: ModelConfig, blocks: Sequence[int]) -> NDArray[Any]:
    """A copy of blocks, as `BlockStore` has it: (blocks, 2, layers, BLOCK_SIZE, kv heads, head_dim)."""
    found: NDArray[Any] = np.empty((len(blocks), *_block_shape(config)), _numpy_type(cache.dtype))
    for index, block in enumerate(blocks):
        for which, layer, part in _parts(cache, config, block):
            vectors = device.download(part).reshape(_stored_shape(cache, config))
            found[index, which, layer] = vectors[..., : config.head_dim].swapaxes(0, 1)
    return found


def write_blocks(
    device: Device, cache: KvCache, config: ModelConfig, blocks: Sequence[int], data: NDArray[Any]
) -> None:
    """Put back what `read_blocks` gave. Raises ValueError for data of another shape or type."""
    expected, dtype = (len(blocks), *_block_shape(config)), np.dtype(_numpy_type(cache.dtype))
    if data.shape != expected or data.dtype != dtype:
        raise ValueError(f"found blocks of {data.dtype} {data.shape}, expected {dtype} {expected}")
    vectors = np.zeros(_stored_shape(cache, config), dtype)  # what pads a head stays zero
    for index, block in enumerate(blocks):
        for which, layer, part in _parts(cache, config, block):
            vectors[..., : config.head_dim] = data[index, which, layer].swapaxes(0, 1)
            device.write(part, vectors)


def _parts(cache: KvCache, config: ModelConfig, block: int) -> Iterator[tuple[int, int, Array]]:
    """The pieces of a block: 0 for keys and 1 for values, the layer, and where on the device they lie."""
    items = BLOCK_SIZE * config.kv_head_count * cache.head_stride
    for which, pools in enumerate((cache.keys, cache.values)):
        for layer, pool in enumerate(pools):
            yield which, layer, pool[block * items : (block + 1) * items]


def _stored_shape(cache: KvCache, config: ModelConfig) -> tuple[int, ...]:
    return config.kv_head_count, BLOCK_SIZE, cache.head_stride


def _block_shape(config: ModelConfig) -> tuple[int, ...]:
    return 2, config.layer_count, BLOCK_SIZE, config.kv_head_count, config.head_dim


def _numpy_type(dtype: KvDtype) -> type:
    return np.float16 if dtype == "f16" else np.float32
