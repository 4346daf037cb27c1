"""The KV block pool's memory: where compiled code finds it, and blocks of it as plain arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.batch import BLOCK_SIZE
from svdengine.kernels.cpu.aligned import scattered
from svdengine.kernels.cpu.model import Model
from svdengine.kernels.cpu.workspace import KV_F16, KV_F32, KV_Q8, Cache
from svdengine.kernels.executor import KvDtype
from svdengine.kernels.kv_q8 import GROUP, PACKED, group_count, pack_kv, unpack_kv


def allocate_kv(
    model: Model, block_count: int, kv_dtype: KvDtype, shape: tuple[NDArray[np.float32], NDArray[np.float32]]
) -> KvBlocks | QuantizedKvBlocks:
    """An empty pool. `shape`: what is done to keys before they are rounded (`key_shape`)."""
    if kv_dtype == "q8":
        return QuantizedKvBlocks(model, block_count, *shape)
    return KvBlocks(model, block_count, np.dtype(np.float32 if kv_dtype == "f32" else np.float16))


class KvBlocks:
    """Keys, dimension-major, and values, token-major, by layer, KV head and block; untouched pages cost no memory."""

    def __init__(self, model: Model, block_count: int, dtype: np.dtype[Any]) -> None:
        self._head_dim = model.head_dim
        heads = (model.layers, model.kv_heads, block_count)
        size, key_dim = dtype.itemsize, -(-model.head_dim // 4) * 4
        key_head, value_head = size * key_dim * BLOCK_SIZE, size * model.value_stride * BLOCK_SIZE
        count = model.layers * model.kv_heads * block_count
        keys, values = scattered(count * key_head), scattered(count * value_head)
        self._keys = keys.view(dtype).reshape(*heads, key_dim, BLOCK_SIZE)
        self._values = values.view(dtype).reshape(*heads, BLOCK_SIZE, model.value_stride)
        self.bytes_per_token = model.layers * model.kv_heads * (key_head + value_head) // BLOCK_SIZE
        kind = KV_F16 if dtype == np.float16 else KV_F32
        self.cache = Cache(keys.ctypes.data, values.ctypes.data, key_head, value_head, block_count, key_dim, kind, 0, 0)

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
        _check(data, self._keys.dtype, (len(at), 2, layers, BLOCK_SIZE, kv_heads, self._head_dim))
        self._keys[:, :, at, : self._head_dim] = data[:, 0].transpose(1, 3, 0, 4, 2)
        self._values[:, :, at, :, : self._head_dim] = data[:, 1].transpose(1, 3, 0, 2, 4)


class QuantizedKvBlocks:
    """The same in 8 bits, as kv_q8.py lays them out. A block of a head is levels, then scales, to a cache line."""

    def __init__(
        self, model: Model, block_count: int, offsets: NDArray[np.float32], factors: NDArray[np.float32]
    ) -> None:
        self._groups, self._value_stride = group_count(model.head_dim), model.value_stride
        key_dim = GROUP * self._groups
        scales = 2 * self._groups * BLOCK_SIZE
        key_head, value_head = (-(-(width * BLOCK_SIZE + scales) // 64) * 64 for width in (key_dim, model.value_stride))
        heads = (model.layers, model.kv_heads, block_count)
        count = model.layers * model.kv_heads * block_count
        keys, values = scattered(count * key_head), scattered(count * value_head)
        self._keys, self._values = keys.reshape(*heads, key_head), values.reshape(*heads, value_head)
        self.bytes_per_token = model.layers * model.kv_heads * (key_head + value_head) // BLOCK_SIZE
        self._offsets, self._factors = (
            np.zeros((*heads[:2], key_dim), np.float32),
            np.ones((*heads[:2], key_dim), np.float32),
        )
        self._offsets[..., : model.head_dim], self._factors[..., : model.head_dim] = offsets, factors
        self.cache = Cache(
            keys.ctypes.data,
            values.ctypes.data,
            key_head,
            value_head,
            block_count,
            key_dim,
            KV_Q8,
            self._offsets.ctypes.data,
            self._factors.ctypes.data,
        )

    def read(self, blocks: Sequence[int]) -> NDArray[np.uint8]:
        """See BlockStore."""
        at = np.asarray(blocks, np.intp)
        groups, stride = self._groups, self._value_stride
        keys, key_scales = self._parts(self._keys[:, :, at], GROUP * groups)
        keys = keys.reshape(*keys.shape[:3], groups, GROUP // 4, BLOCK_SIZE, 4).transpose(2, 0, 5, 1, 3, 4, 6)
        values, value_scales = self._parts(self._values[:, :, at], stride)
        wide = np.zeros((*values.shape[:3], BLOCK_SIZE, groups * GROUP), np.int8)
        wide[..., :stride] = values.reshape(*values.shape[:3], BLOCK_SIZE, stride)
        wide = wide.reshape(*wide.shape[:-1], groups, GROUP).transpose(2, 0, 3, 1, 4, 5)
        return np.stack([pack_kv(keys.reshape(wide.shape), key_scales), pack_kv(wide, value_scales)], 1)

    def write(self, blocks: Sequence[int], data: NDArray[Any]) -> None:
        """See BlockStore."""
        at = np.asarray(blocks, np.intp)
        layers, kv_heads = self._keys.shape[:2]
        _check(data, np.dtype(np.uint8), (len(at), 2, layers, BLOCK_SIZE, kv_heads, self._groups, PACKED))
        (keys, values), (key_scales, value_scales) = zip(*(unpack_kv(data[:, i]) for i in range(2)), strict=True)
        keys = keys.reshape(*keys.shape[:-1], GROUP // 4, 4).transpose(1, 3, 0, 4, 5, 2, 6)
        values = values.reshape(*values.shape[:-2], -1)[..., : self._value_stride].transpose(1, 3, 0, 2, 4)
        for pool, levels, scales in ((self._keys, keys, key_scales), (self._values, values, value_scales)):
            parts = [np.ascontiguousarray(levels), np.ascontiguousarray(scales.transpose(1, 3, 0, 4, 2))]
            raw = np.concatenate([part.reshape(*part.shape[:3], -1).view(np.uint8) for part in parts], -1)
            pool[:, :, at, : raw.shape[-1]] = raw

    def _parts(self, raw: NDArray[np.uint8], width: int) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
        """Levels of blocks (layers, kv heads, n, ..) as they lie; scales (n, layers, BLOCK_SIZE, kv heads, groups)."""
        end = width * BLOCK_SIZE
        scales = np.ascontiguousarray(raw[..., end : end + 2 * self._groups * BLOCK_SIZE]).view(np.float16)
        scales = scales.reshape(*raw.shape[:3], self._groups, BLOCK_SIZE).transpose(2, 0, 4, 1, 3)
        return raw[..., :end].view(np.int8), scales


def _check(data: NDArray[Any], dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    if data.shape != shape or data.dtype != dtype:
        raise ValueError(f"found {data.dtype} {data.shape}, expected {dtype} {shape}")
