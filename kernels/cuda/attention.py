"""Attention over KV blocks: tiles of queries that share a kv head, the context split over blocks of threads.

A tile is some rows of one sequence times some query heads of one kv head. In decode it has one row, in prefill several,
so that what is read of the cache serves all of them. Softmax is computed as keys come (arXiv:2205.14135), and with
several splits each leaves a running sum, which `join` adds up (flash decoding).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from svdengine.kernels.batch import BLOCK_SIZE
from svdengine.kernels.cuda.device import Device
from svdengine.kernels.cuda.intrinsics import (
    Kernel,
    as_float,
    h2f,
    jit,
    kernel,
    lane_index,
    ldg128,
    warp_index,
    warp_max,
    warp_sum,
)
from svdengine.kernels.cuda.kv_cache import KvCache, KvDtype, head_stride
from svdengine.kernels.cuda.model import Model
from svdengine.kernels.cuda.workspace import Workspace, parts_of

THREADS = 128
_WARPS = THREADS // 32
_QUERIES = 16  # of a tile, at most
_QUERY_ITEMS = 4096  # float32 of queries in shared memory, at most
_SHARED_ITEMS = 11264  # float32 of shared memory that a block may use: 44 KiB
_LEAST_BLOCKS = 4  # of the context in a split: fewer would not be worth a block of threads
_UNSEEN = np.float32(-1e30)  # a score that no position has
_NOTHING = (np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(0))


def tile_heads(group: int, head_dim: int) -> int:
    """Query heads of a tile, for `group` query heads a kv head."""
    return min(group, _QUERIES, max(1, _QUERY_ITEMS // head_dim))


def tile_rows(group: int, head_dim: int) -> int:
    """Most rows of a tile in prefill."""
    most = min(_QUERIES, max(1, _QUERY_ITEMS // head_dim))
    return max(1, most // tile_heads(group, head_dim))


def _tile_positions(queries: int, head_dim: int) -> int:
    """Positions whose keys are in shared memory at once."""
    for positions in (64, 32, 16):
        if queries * (2 * head_dim + positions + 3) + positions * (head_dim + 1) <= _SHARED_ITEMS:
            return positions
    return 8


@jit(device=True)
def _load_half(cache, tables, table, kv, kv_heads, start, stop, positions, head_dim, words, to):
    """to (positions, head_dim + 1) = vectors of float16 at positions from `start`; zeros from `stop`."""
    pieces = words // 4
    for i in range(cuda.threadIdx.x, positions * pieces, THREADS):
        p, piece = i // pieces, i % pieces
        w = _load_piece(cache, tables, table, kv, kv_heads, start + p, stop, words, piece)
        for k in range(4):
            low, high = h2f(w[k])
            column = 8 * piece + 2 * k
            if column < head_dim:
                to[p * (head_dim + 1) + column] = low
            if column + 1 < head_dim:
                to[p * (head_dim + 1) + column + 1] = high


@jit(device=True)
def _load_single(cache, tables, table, kv, kv_heads, start, stop, positions, head_dim, words, to):
    """As _load_half, of float32."""
    pieces = words // 4
    for i in range(cuda.threadIdx.x, positions * pieces, THREADS):
        p, piece = i // pieces, i % pieces
        w = _load_piece(cache, tables, table, kv, kv_heads, start + p, stop, words, piece)
        for k in range(4):
            column = 4 * piece + k
            if column < head_dim:
                to[p * (head_dim + 1) + column] = as_float(w[k])


@jit(device=True)
def _load_piece(cache, tables, table, kv, kv_heads, at, stop, words, piece):
    """Four words of the vector at position `at`, or zeros from `stop`."""
    w = _NOTHING
    if at < stop:
        block = tables[table + at // BLOCK_SIZE]
        w = ldg128(cache, ((block * kv_heads + kv) * BLOCK_SIZE + at % BLOCK_SIZE) * words + 4 * piece)
    return w


@jit(device=True)
def _update_maximum(scores, best, total, shrink, queries, positions):
    """Turn the scores of each query into weights: e^(score - maximum so far). A warp a query."""
    lane = lane_index()
    for query in range(warp_index(), queries, _WARPS):
        highest = best[query]
        for p in range(lane, positions, 32):
            highest = max(highest, scores[query * positions + p])
        highest = warp_max(highest)
        added = np.float32(0)
        for p in range(lane, positions, 32):
            score = scores[query * positions + p]
            weight = np.float32(math.exp(score - highest)) if score > _UNSEEN else np.float32(0)
            scores[query * positions + p] = weight
            added += weight
        added = warp_sum(added)
        if lane == 0:
            shrink[query] = np.float32(math.exp(best[query] - highest))
            total[query] = total[query] * shrink[query] + added
            best[query] = highest


@cache
def attention_kernel(head_dim: int, rows: int, heads: int, dtype: KvDtype) -> Kernel:
    """Attention of tiles of up to `rows` rows and `heads` heads; grid: (tiles, kv heads * tiles a group, splits)."""
    queries, load = rows * heads, _load_half if dtype == "f16" else _load_single
    items, width = queries * head_dim, head_dim + 1
    positions = _tile_positions(queries, head_dim)
    words = head_stride(head_dim) // (2 if dtype == "f16" else 1)
    room, score_items = positions * width, queries * positions

    @kernel(
        "float32* qkv, uint32* keys, uint32* values, int32* places, int32* sequences, int32* tables, int32* tiles,"
        " float32* partial, float32* out, int32 group, int32 kv_heads, int32 stride, int32 blocks, int32 window,"
        " int32 splits, int32 out_stride",
        name=f"attention_{head_dim}_{rows}x{heads}_{dtype}",
        fastmath=True,
    )
    def attention(
        qkv, keys, values, places, sequences, tables, tiles, partial, out,
        group, kv_heads, stride, blocks, window, splits, out_stride,
    ):  # fmt: skip
        query_items = cuda.shared.array(items, types.float32)
        vectors = cuda.shared.array(room, types.float32)
        scores = cuda.shared.array(score_items, types.float32)
        best = cuda.shared.array(queries, types.float32)
        total = cuda.shared.array(queries, types.float32)
        shrink = cuda.shared.array(queries, types.float32)
        sums = cuda.shared.array(items, types.float32)  # each touched by one thread only

        # Which rows and heads: queries past the end are computed as zeros and not written.
        first, count = tiles[2 * cuda.blockIdx.x], tiles[2 * cuda.blockIdx.x + 1]
        chunks = (group + heads - 1) // heads
        kv, chunk = cuda.blockIdx.y // chunks, cuda.blockIdx.y % chunks
        head, present = kv * group + chunk * heads, min(heads, group - chunk * heads)
        t = cuda.threadIdx.x
        for i in range(t, items, THREADS):
            row, h = i // head_dim // heads, i // head_dim % heads
            inside = row < count and h < present
            at = (first + row) * stride + (head + h) * head_dim + i % head_dim
            query_items[i] = qkv[at] if inside else np.float32(0)
            sums[i] = np.float32(0)
        for i in range(t, queries, THREADS):
            best[i], total[i] = _UNSEEN, np.float32(0)

        # Which blocks of the context: what some row sees, and of it this split's share.
        begin = max(0, places[first] - window + 1) // BLOCK_SIZE
        end = places[first + count - 1] // BLOCK_SIZE + 1
        share = max((end - begin + splits - 1) // splits, _LEAST_BLOCKS)
        begin += cuda.blockIdx.z * share
        stop = min(end, begin + share) * BLOCK_SIZE
        table = sequences[first] * blocks
        for start in range(begin * BLOCK_SIZE, stop, positions):
            cuda.syncthreads()
            load(keys, tables, table, kv, kv_heads, start, stop, positions, head_dim, words, vectors)
            cuda.syncthreads()
            for i in range(t, score_items, THREADS):
                query, p = i // positions, i % positions
                score = np.float32(0)
                for d in range(head_dim):
                    score += query_items[query * head_dim + d] * vectors[p * width + d]
                distance = places[first + min(query // heads, count - 1)] - (start + p)
                seen = distance >= 0 and distance < window and start + p < stop
                scores[i] = score if seen else _UNSEEN
            cuda.syncthreads()
            load(values, tables, table, kv, kv_heads, start, stop, positions, head_dim, words, vectors)
            _update_maximum(scores, best, total, shrink, queries, positions)
            cuda.syncthreads()
            for i in range(t, items, THREADS):
                query, d = i // head_dim, i % head_dim
                s = sums[i] * shrink[query]
                for p in range(positions):
                    s += scores[query * positions + p] * vectors[p * width + d]
                sums[i] = s

        cuda.syncthreads()
        for i in range(t, items, THREADS):
            query, d = i // head_dim, i % head_dim
            row, h = query // heads, query % heads
            if row < count and h < present:
                if splits == 1:
                    out[(first + row) * out_stride + (head + h) * head_dim + d] = sums[i] / total[query]
                else:
                    at = ((first + row) * kv_heads * group + head + h) * splits + cuda.blockIdx.z
                    partial[at * (head_dim + 2) + d] = sums[i]
                    if d == 0:
                        partial[at * (head_dim + 2) + head_dim] = best[query]
                        partial[at * (head_dim + 2) + head_dim + 1] = total[query]

    return attention


@kernel("float32* partial, float32* out, int32 head_dim, int32 splits, int32 out_stride", fastmath=True)
def join(partial, out, head_dim, splits, out_stride):
    """out = the attention of each row and head, from what its splits left. Grid: (rows, heads)."""
    at = (cuda.blockIdx.x * cuda.gridDim.y + cuda.blockIdx.y) * splits
    width = head_dim + 2
    highest = _UNSEEN
    for split in range(splits):
        highest = max(highest, partial[(at + split) * width + head_dim])
    for d in range(cuda.threadIdx.x, head_dim, cuda.blockDim.x):
        mixed, total = np.float32(0), np.float32(0)
        for split in range(splits):
            part = (at + split) * width
            weight = np.float32(math.exp(partial[part + head_dim] - highest))
            mixed += weight * partial[part + d]
            total += weight * partial[part + head_dim + 1]
        out[cuda.blockIdx.x * out_stride + cuda.blockIdx.y * head_dim + d] = mixed / total


def attend(
    device: Device, model: Model, index: int, work: Workspace, cache: KvCache, n: int, tiles: int, rows: int
) -> None:
    """work.attention of n rows, in `tiles` tiles (work.tiles) of up to `rows` rows each, over layer `index`'s cache."""
    config, splits = model.config, min(parts_of(n), -(-work.sizes.blocks // _LEAST_BLOCKS))
    group, head_dim = config.head_count // config.kv_head_count, config.head_dim
    heads = tile_heads(group, head_dim)
    grid = (tiles, config.kv_head_count * -(-group // heads), splits)
    arguments: tuple[Any, ...] = (
        work.qkv, cache.keys[index], cache.values[index], work.positions, work.sequences, work.block_tables, work.tiles,
        work.partial, work.attention, group, config.kv_head_count, work.sizes.qkv, work.sizes.blocks,
        model.layers[index].window, splits, work.sizes.attention,
    )  # fmt: skip
    device.launch(attention_kernel(head_dim, rows, heads, cache.dtype), grid, THREADS, *arguments)
    if splits > 1:
        device.launch(
            join, (n, config.head_count), THREADS, work.partial, work.attention, head_dim, splits, work.sizes.attention
        )  # fmt: skip


def every_kernel() -> Iterator[Kernel]:
    """Some of those that models may want: decode and prefill, few and many heads, wide and narrow ones."""
    for head_dim, group, dtype in ((128, 8, "f16"), (80, 4, "f32")):
        for rows in (1, tile_rows(group, head_dim)):
            yield attention_kernel(head_dim, rows, tile_heads(group, head_dim), dtype)
    yield attention_kernel(256, 1, tile_heads(16, 256), "f16")
