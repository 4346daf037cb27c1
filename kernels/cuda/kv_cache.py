"""The KV block pool on the device: keys after rope, and values, in blocks that sequences' tables point to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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
    items, kind = block_count * BLOCK_SIZE * config.kv_head_count * stride, np.float16 if dtype == "f16" else np.float32

    def pool() -> tuple[Array, ...]:
        return tuple(device.zeros(items, kind) for _ in range(config.layer_count))

    return KvCache(pool(), pool(), dtype, stride)
