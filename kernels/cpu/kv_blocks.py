"""The KV block pool's memory: where compiled code finds it, and blocks of it as plain arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.batch import BLOCK_SIZE
from svdengine.kernels.cpu.aligned import aligned
from svdengine.kernels.cpu.model import Model
from svdengine.kernels.cpu.workspace import Cache


class KvBlocks:
    """Keys, dimension-major, and values, token-major, by layer, KV head and block; untouched pages cost no memory."""

    def __init__(self, model: Model, block_count: int, dtype: np.dtype[Any]) -> None:
        self._head_dim = model.head_dim
        heads = (model.layers, model.kv_heads, block_count)
        size = dtype.itemsize
        key_head, value_head = size * model.key_dim * BLOCK_SIZE, size * model.value_stride * BLOCK_SIZE
        count = model.layers * model.kv_heads * block_count
        keys, values = aligned(count * key_head), aligned(count * value_head)
        self._keys = keys.view(dtype).reshape(*heads, model.key_dim, BLOCK_SIZE)
        self._values = values.view(dtype).reshape(*heads, BLOCK_SIZE, model.value_stride)
        self.bytes_per_token = model.layers * model.kv_heads * (key_head + value_head) // BLOCK_SIZE
        self.cache = Cache(
            keys.ctypes.data, values.ctypes.data, key_head, value_head, block_count, self._keys.dtype == np.float16
        )

    def read(self, blocks: Sequence[int]) -> NDArray[Any]:
        """See BlockStore."""
        at = np.asarray(blocks, np.intp)
        keys = self._keys[:, :, at, : self._head_dim].transpose(2, 0, 4, 1, 3)
        values = self._values[:, :, at, :, : self._head_dim].transpose(2, 0, 3, 1, 4)
        return np.stack([keys, values], 1)

    def write(self, blocks: Sequence[int], data: NDArray[Any]) -> None:
        """See BlockStore."""
        at = np.asarray(blocks, np.intp)
        layers, kv_heads = self._keys.shape[:2]
        expected = (len(at), 2, layers, BLOCK_SIZE, kv_heads, self._head_dim)
        if data.shape != expected or data.dtype != self._keys.dtype:
            raise ValueError(f"found {data.dtype} {data.shape}, expected {self._keys.dtype} {expected}")
        self._keys[:, :, at, : self._head_dim] = data[:, 0].transpose(1, 3, 0, 4, 2)
        self._values[:, :, at, :, : self._head_dim] = data[:, 1].transpose(1, 3, 0, 2, 4)
