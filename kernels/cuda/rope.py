"""What happens to q, k and v before attention: norms of heads, rotary embedding, and the write into KV blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import numpy as np
from numba import cuda

from svdengine.kernels.batch import BLOCK_SIZE
from svdengine.kernels.cuda.device import Device
from svdengine.kernels.cuda.intrinsics import Kernel, jit, kernel, lane_index, warp_index, warp_sum
from svdengine.kernels.cuda.kv_cache import KvCache, KvDtype
from svdengine.kernels.cuda.model import LayerWeights, Model
from svdengine.kernels.cuda.workspace import Workspace

THREADS = 128
_WARPS = THREADS // 32


@jit(device=True)
def place_head(
    qkv, at, head, position, table, keys, values, tables, cos, sin, q_norm, k_norm,
    heads, kv_heads, head_dim, head_stride, eps, factor, normed, rotated,
):  # fmt: skip
    """Norm and rotate a head of q or k in place, q times `factor`, or write one of k or v into the cache; by a warp.

    at: where the row of qkv begins; table: where the sequence's block table does.
    """
    lane, half = lane_index(), head_dim >> 1
    at += head * head_dim
    is_query, is_value = head < heads, head >= heads + kv_heads
    if normed and not is_value:
        total = np.float32(0)
        for i in range(lane, head_dim, 32):
            total += qkv[at + i] * qkv[at + i]
        scale = np.float32(1) / np.float32(math.sqrt(warp_sum(total) / np.float32(head_dim) + eps))
        for i in range(lane, head_dim, 32):
            qkv[at + i] *= scale * (q_norm[i] if is_query else k_norm[i])
        cuda.syncwarp()  # a lane rotates what another one scaled
    if rotated and not is_value:
        for i in range(lane, half, 32):
            a, b = qkv[at + i], qkv[at + i + half]
            c, s = cos[position * half + i], sin[position * half + i]
            qkv[at + i] = a * c - b * s
            qkv[at + i + half] = b * c + a * s
        cuda.syncwarp()
    if is_query:
        for i in range(lane, head_dim, 32):
            qkv[at + i] *= factor
        return
    kv = head - heads - (kv_heads if is_value else 0)
    to = ((tables[table + position // BLOCK_SIZE] * kv_heads + kv) * BLOCK_SIZE + position % BLOCK_SIZE) * head_stride
    for i in range(lane, head_dim, 32):
        if is_value:
            values[to + i] = qkv[at + i]
        else:
            keys[to + i] = qkv[at + i]


@cache
def place_kernel(dtype: KvDtype) -> Kernel:
    """Norm and rotate the heads of q and k in place, q times `factor`, and write k and v into the cache.

    A warp a head. `normed`: whether heads have a norm; `rotated`: whether there is rotary embedding.
    """
    item = "float16" if dtype == "f16" else "float32"

    @kernel(
        f"float32* qkv, {item}* keys, {item}* values, int32* positions, int32* sequences, int32* tables,"
        " float32* cos, float32* sin, float32* q_norm, float32* k_norm,"
        " int32 heads, int32 kv_heads, int32 head_dim, int32 stride, int32 head_stride, int32 blocks,"
        " float32 eps, float32 factor, int32 normed, int32 rotated",
        name=f"place_{dtype}",
    )
    def place(
        qkv, keys, values, positions, sequences, tables, cos, sin, q_norm, k_norm,
        heads, kv_heads, head_dim, stride, head_stride, blocks, eps, factor, normed, rotated,
    ):  # fmt: skip
        head = cuda.blockIdx.y * _WARPS + warp_index()
        if head >= heads + 2 * kv_heads:
            return
        row = cuda.blockIdx.x
        place_head(
            qkv, row * stride, head, positions[row], sequences[row] * blocks, keys, values, tables, cos, sin, q_norm,
            k_norm, heads, kv_heads, head_dim, head_stride, eps, factor, normed, rotated,
        )  # fmt: skip

    return place


def place_keys(
    device: Device, model: Model, layer: LayerWeights, index: int, work: Workspace, cache: KvCache, n: int
) -> None:
    """Prepare work.qkv of n rows for attention, and write keys and values of layer `index` into the cache."""
    config = model.config
    heads = config.head_count + 2 * config.kv_head_count
    device.launch(
        place_kernel(cache.dtype), (n, -(-heads // _WARPS)), THREADS,
        work.qkv, cache.keys[index], cache.values[index], work.positions, work.sequences, work.block_tables,
        layer.cos, layer.sin, layer.q_norm, layer.k_norm, config.head_count, config.kv_head_count, config.head_dim,
        work.sizes.qkv, cache.head_stride, work.sizes.blocks, config.norm_eps, config.attention_scale,
        int(config.qk_norm and not config.qk_norm_joint), int(layer.rotated),
    )  # fmt: skip


def every_kernel() -> Iterator[Kernel]:
    """The kernels of both types of cache."""
    yield place_kernel("f16")
    yield place_kernel("f32")
