"""Attention over KV blocks: tiles of queries that share a kv head, the context split over blocks of threads.

A tile is some rows of one sequence times some query heads of one kv head, so that what is read of the cache serves all
of them. In decode it has one row (attention_rows.py), in prefill several, on tensor cores where the cache is float16
(attention_tiles.py). With several splits each leaves a running sum, which `join` adds up (flash decoding).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from svdengine.kernels.cuda import attention_rows, attention_tiles
from svdengine.kernels.cuda.device import Device
from svdengine.kernels.cuda.intrinsics import Kernel, kernel, lane_index, warp_max, warp_sum
from svdengine.kernels.cuda.kv_cache import KvCache, KvDtype
from svdengine.kernels.cuda.model import Model
from svdengine.kernels.cuda.rounding import store_fine
from svdengine.kernels.cuda.tensor_cores import exp2
from svdengine.kernels.cuda.workspace import LEAST_PARTS, Workspace, parts_of
from svdengine.kernels.formats import GROUP

_LEAST_BLOCKS = 4  # of the context in a split: fewer would not be worth a block of threads
_BLOCKS = 1024  # of threads, that keep every multiprocessor busy: more splits would only be more to join
_JOIN_THREADS = 128
_ZERO = np.float32(0)


def _most_queries(head_dim: int, dtype: KvDtype, alone: bool) -> int:
    on_tensor_cores = dtype == "f16" and not alone
    return attention_tiles.most_queries(head_dim) if on_tensor_cores else attention_rows.most_queries(head_dim)


def tile_rows(group: int, head_dim: int, dtype: KvDtype) -> int:
    """Most rows of a tile in prefill, for `group` query heads a kv head."""
    most = _most_queries(head_dim, dtype, alone=False)
    return max(1, most // min(group, most))


@kernel(
    "float32* partial, float32* out, uint8* codes, float32* values, int32 head_dim, int32 splits, int32 out_stride,"
    "int32 rounded"
)
def join(partial, out, codes, values, head_dim, splits, out_stride, rounded):
    """out = the attention of each row and head, from what its splits left; rounded too, if so. Grid: (rows, heads)."""
    factors = cuda.shared.array(LEAST_PARTS, types.float32)
    at = (cuda.blockIdx.x * cuda.gridDim.y + cuda.blockIdx.y) * splits
    row, width, lane = cuda.blockIdx.x * out_stride, head_dim + 2, lane_index()
    highest, total = attention_rows.UNSEEN, _ZERO
    for split in range(lane, splits, 32):
        highest = max(highest, partial[(at + split) * width + head_dim])
    highest = warp_max(highest)
    for split in range(lane, splits, 32):
        factor = exp2(partial[(at + split) * width + head_dim] - highest)
        total += factor * partial[(at + split) * width + head_dim + 1]
        factors[split] = factor  # every warp writes the same
    total = warp_sum(total)
    cuda.syncthreads()
    for d in range(cuda.threadIdx.x, head_dim, cuda.blockDim.x):
        mixed = _ZERO
        for split in range(splits):
            mixed += factors[split] * partial[(at + split) * width + d]
        value, column = mixed / total, cuda.blockIdx.y * head_dim + d
        out[row + column] = value
        if rounded:  # whole warps: head_dim is a multiple of 32
            store_fine(value, codes, values, row, out_stride, column)


def attend(
    device: Device,
    model: Model,
    index: int,
    work: Workspace,
    cache: KvCache,
    n: int,
    tiles: int,
    rows: int,
    *,
    rounded: bool = False,
) -> bool:
    """work.attention of n rows, in `tiles` tiles (work.tiles) of up to `rows` rows each, over layer `index`'s cache.

    `rounded`: it is wanted in work.rounded too, rounded to integers; returns whether it is there.
    """
    config = model.config
    group, head_dim = config.head_count // config.kv_head_count, config.head_dim
    alone = rows == 1
    heads = min(group, _most_queries(head_dim, cache.dtype, alone))
    of_split = tiles * config.kv_head_count * -(-group // heads)  # blocks of threads
    splits = min(parts_of(n), -(-work.sizes.blocks // _LEAST_BLOCKS), -(-_BLOCKS // of_split))
    grid = (tiles, config.kv_head_count * -(-group // heads), splits)
    arguments: tuple[Any, ...] = (
        work.qkv, cache.keys[index], cache.values[index], work.positions, work.sequences, work.block_tables, work.tiles,
        work.partial, work.attention, group, config.kv_head_count, work.sizes.qkv, work.sizes.blocks,
        model.layers[index].window, splits, _LEAST_BLOCKS, work.sizes.attention,
    )  # fmt: skip
    if cache.dtype == "f16" and not alone:
        device.launch(attention_tiles.tiles_kernel(head_dim, heads), grid, attention_tiles.THREADS, *arguments)
    else:
        chosen = attention_rows.rows_kernel(head_dim, rows, heads, cache.dtype)
        device.launch(chosen, grid, attention_rows.THREADS, *arguments)
    if splits == 1:
        return False
    # A group of 32 columns is one head's, and all columns of a row are some head's: no padding to be zeroed.
    rounded = rounded and head_dim % GROUP == 0 and config.head_count * head_dim == work.sizes.attention
    device.launch(
        join, (n, config.head_count), _JOIN_THREADS, work.partial, work.attention, work.rounded, work.rounded, head_dim,
        splits, work.sizes.attention, int(rounded),
    )  # fmt: skip
    return rounded


def every_kernel() -> Iterator[Kernel]:
    """Some of those that models may want: decode and prefill, few and many heads, wide and narrow ones."""
    for head_dim, group, dtype in ((128, 1, "f16"), (128, 8, "f16"), (64, 4, "f16"), (80, 4, "f32"), (256, 8, "f16")):
        yield attention_rows.rows_kernel(head_dim, 1, group, dtype)
    yield attention_rows.rows_kernel(128, 2, 4, "f32")
    for head_dim, heads in ((128, 1), (128, 8), (80, 4), (256, 4)):
        yield attention_tiles.tiles_kernel(head_dim, heads)
