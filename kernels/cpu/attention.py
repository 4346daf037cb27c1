"""Attention over the KV blocks of a sequence: tiles of up to 4 queries that share a KV head, softmax on the way.

The cache is read in runs of 256 positions. Each query keeps its largest score so far, the sum of its weights and its
weighted sum of values, and rescales the last two when the first grows (Milakov and Gimelshein, arXiv 1805.02867), so
that runs may also be shared out between threads and joined afterwards.
"""

from __future__ import annotations

import numpy as np

from svdengine.kernels.cpu.attention_tile import (
    mask_outside,
    narrow_f16,
    narrow_f32,
    narrow_q8,
    scores_1_f16,
    scores_1_f32,
    scores_2_f16,
    scores_2_f32,
    scores_3_f16,
    scores_3_f32,
    scores_4_f16,
    scores_4_f32,
    values_1_f16,
    values_1_f32,
    values_1_q8,
    values_2_f16,
    values_2_f32,
    values_2_q8,
    values_3_f16,
    values_3_f32,
    values_3_q8,
    values_4_f16,
    values_4_f32,
    values_4_q8,
)
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.kv_q8 import GROUP, scores_1_q8, scores_2_q8, scores_3_q8, scores_4_q8, weigh_scales
from svdengine.kernels.cpu.simd import (
    exp_f32,
    first_lane,
    load_f32,
    load_real,
    max_lanes,
    maximum_f32,
    select_greater,
    splat_f32,
    store_f32,
    store_half,
    store_real,
    sum_lanes,
    zero_f32,
)
from svdengine.kernels.cpu.workspace import KV_F16, KV_Q8

LOWEST = np.float32(-1e30)  # the score of a token that is not seen
_SEEN = np.float32(-1e29)
_ONE = np.float32(1)
_RUN = 256  # positions
_SCORE_BYTES = 4 * _RUN


@jit
def exp_real(x):
    """e^x of one number, as the vectors have it."""
    return first_lane(exp_f32(splat_f32(x)))


@jit
def store_key_value(key, value, key_block, value_block, slot, head_dim, value_stride, kind):
    """Write one token's key and value head into its slot of a block, in float16 or float32."""
    if kind == KV_F16:
        for d in range(head_dim):
            store_half(key_block + 2 * (16 * d + slot), load_real(key + 4 * d))
            store_half(value_block + 2 * (value_stride * slot + d), load_real(value + 4 * d))
    else:
        for d in range(head_dim):
            store_real(key_block + 4 * (16 * d + slot), load_real(key + 4 * d))
            store_real(value_block + 4 * (value_stride * slot + d), load_real(value + 4 * d))


@jit
def block_scores(count, kind, queries, keys, key_dim, scores):
    """Scores of `count` queries with one block; 16 floats a query, a run apart."""
    if kind == KV_Q8:
        groups = key_dim // GROUP
        if count == 1:
            scores_1_q8(queries, keys, groups, scores, _SCORE_BYTES)
        elif count == 2:
            scores_2_q8(queries, keys, groups, scores, _SCORE_BYTES)
        elif count == 3:
            scores_3_q8(queries, keys, groups, scores, _SCORE_BYTES)
        else:
            scores_4_q8(queries, keys, groups, scores, _SCORE_BYTES)
    elif kind == KV_F16:
        if count == 1:
            scores_1_f16(queries, keys, key_dim, scores, _SCORE_BYTES)
        elif count == 2:
            scores_2_f16(queries, keys, key_dim, scores, _SCORE_BYTES)
        elif count == 3:
            scores_3_f16(queries, keys, key_dim, scores, _SCORE_BYTES)
        else:
            scores_4_f16(queries, keys, key_dim, scores, _SCORE_BYTES)
    elif count == 1:
        scores_1_f32(queries, keys, key_dim, scores, _SCORE_BYTES)
    elif count == 2:
        scores_2_f32(queries, keys, key_dim, scores, _SCORE_BYTES)
    elif count == 3:
        scores_3_f32(queries, keys, key_dim, scores, _SCORE_BYTES)
    else:
        scores_4_f32(queries, keys, key_dim, scores, _SCORE_BYTES)


@jit
def wide_values(count, kind, weights, weight_stride, values, value_bytes, tokens, sums, stride):
    """sums += weights times 64 columns of values."""
    if kind == KV_Q8:
        if count == 1:
            values_1_q8(weights, weight_stride, values, value_bytes, tokens, sums, stride)
        elif count == 2:
            values_2_q8(weights, weight_stride, values, value_bytes, tokens, sums, stride)
        elif count == 3:
            values_3_q8(weights, weight_stride, values, value_bytes, tokens, sums, stride)
        else:
            values_4_q8(weights, weight_stride, values, value_bytes, tokens, sums, stride)
    elif kind == KV_F16:
        if count == 1:
            values_1_f16(weights, weight_stride, values, value_bytes, tokens, sums, stride)
        elif count == 2:
            values_2_f16(weights, weight_stride, values, value_bytes, tokens, sums, stride)
        elif count == 3:
            values_3_f16(weights, weight_stride, values, value_bytes, tokens, sums, stride)
        else:
            values_4_f16(weights, weight_stride, values, value_bytes, tokens, sums, stride)
    elif count == 1:
        values_1_f32(weights, weight_stride, values, value_bytes, tokens, sums, stride)
    elif count == 2:
        values_2_f32(weights, weight_stride, values, value_bytes, tokens, sums, stride)
    elif count == 3:
        values_3_f32(weights, weight_stride, values, value_bytes, tokens, sums, stride)
    else:
        values_4_f32(weights, weight_stride, values, value_bytes, tokens, sums, stride)


@jit
def item_bytes(kind):
    """Bytes of one item of a key or value."""
    return 1 if kind == KV_Q8 else (2 if kind == KV_F16 else 4)


@jit
def block_values(count, kind, weights, weight_stride, values, value_stride, tokens, sums, stride):
    """sums (count, value_stride) += weights times the values of `tokens` neighbouring tokens.

    weight_stride: bytes from query to query. In 8 bits every group of columns has its weights, 64 bytes apart.
    """
    size = item_bytes(kind)
    column = 0
    while column + 64 <= value_stride:
        line, at = weights + (2 * column if kind == KV_Q8 else 0), values + size * column
        wide_values(count, kind, line, weight_stride, at, size * value_stride, tokens, sums + 4 * column, stride)
        column += 64
    while column < value_stride:
        at = values + size * column
        for t in range(count):
            line, to = weights + t * weight_stride, sums + t * stride + 4 * column
            if kind == KV_Q8:
                narrow_q8(line + 64 * (column // GROUP), weight_stride, at, value_stride, tokens, to, stride)
            elif kind == KV_F16:
                narrow_f16(line, weight_stride, at, size * value_stride, tokens, to, stride)
            else:
                narrow_f32(line, weight_stride, at, size * value_stride, tokens, to, stride)
        column += 16


@jit
def sum_bytes(value_stride):
    """A query's running sums: its values, then its largest score and the sum of its weights on a line of their own."""
    return 4 * value_stride + 64


@jit
def clear_sums(sums, count, value_stride):
    """Sums of `count` queries that have seen nothing."""
    for t in range(count):
        at = sums + t * sum_bytes(value_stride)
        for c in range(0, 4 * value_stride + 64, 64):
            store_f32(at + c, zero_f32())
        store_real(at + 4 * value_stride, LOWEST)


@jit
def weigh_run(scores, count, sums, value_stride):
    """Turn a query's scores (a multiple of 16) into weights relative to its largest score, and rescale its sums."""
    top = splat_f32(LOWEST)
    for i in range(0, 4 * count, 64):
        top = maximum_f32(top, load_f32(scores + i))
    before = load_real(sums + 4 * value_stride)
    largest = max(before, max_lanes(top))
    top = splat_f32(largest)
    total = zero_f32()
    for i in range(0, 4 * count, 64):
        s = load_f32(scores + i)
        weight = select_greater(s, splat_f32(_SEEN), exp_f32(s - top), zero_f32())
        store_f32(scores + i, weight)
        total = total + weight
    scale = exp_real(before - largest)
    if scale != _ONE:
        for c in range(0, 4 * value_stride, 64):
            store_f32(sums + c, load_f32(sums + c) * splat_f32(scale))
    store_real(sums + 4 * value_stride, largest)
    store_real(sums + 4 * value_stride + 4, load_real(sums + 4 * value_stride + 4) * scale + sum_lanes(total))


@jit
def attend(count, queries, lows, highs, keys, values, table, strides, sizes, kind, first, last, sums, scratch):
    """Add blocks first..last (exclusive) of a sequence to the sums of `count` queries of one KV head.

    queries: (key_dim, count) float32, scaled, or what gather_q8 makes of them. lows, highs: positions that each query
    sees. keys, values: the pools at this layer and head. table: block of each 16 positions. strides: bytes from block
    to block in the two pools. sizes: (key_dim, value_stride), of what is stored. scratch: a run of scores a query, and
    then a weight of each token and group.
    """
    key_dim, value_stride = sizes
    key_stride, value_block_stride = strides
    stride = sum_bytes(value_stride)
    groups = key_dim // GROUP
    low, high = lows[0], highs[0]
    for t in range(1, count):
        low, high = min(low, lows[t]), max(high, highs[t])
    size = item_bytes(kind)
    for start in range(first, last, _RUN // 16):
        stop = min(last, start + _RUN // 16)
        for block in range(start, stop):
            at = scratch + 64 * (block - start)
            block_scores(count, kind, queries, keys + table[block] * key_stride, key_dim, at)
            for t in range(count):
                line = at + t * _SCORE_BYTES
                store_f32(line, mask_outside(load_f32(line), 16 * block, lows[t], highs[t], LOWEST))
        for t in range(count):
            weigh_run(scratch + t * _SCORE_BYTES, 16 * (stop - start), sums + t * stride, value_stride)
        for block in range(start, stop):
            # Slots beyond the sequence are not read: they may hold another's NaN.
            a, b = max(0, low - 16 * block), min(16, high + 1 - 16 * block)
            if a < b:
                at = values + table[block] * value_block_stride
                weights, weight_stride = scratch + 64 * (block - start), _SCORE_BYTES
                if kind == KV_Q8:
                    scaled = scratch + count * _SCORE_BYTES
                    weigh_scales(count, weights, weight_stride, at + 16 * value_stride, groups, scaled)
                    weights, weight_stride = scaled, 64 * groups
                line = at + size * a * value_stride
                block_values(count, kind, weights + 4 * a, weight_stride, line, value_stride, b - a, sums, stride)


@jit
def finish(sums, parts, part_stride, value_stride, head_dim, out):
    """out (head_dim) = the attention output that `parts` partial sums of one query make together."""
    top = LOWEST
    for part in range(parts):
        top = max(top, load_real(sums + part * part_stride + 4 * value_stride))
    total = np.float32(0)
    for part in range(parts):
        at = sums + part * part_stride + 4 * value_stride
        total += load_real(at + 4) * exp_real(load_real(at) - top)
    for d in range(head_dim):
        store_real(out + 4 * d, np.float32(0))
    for part in range(parts):
        at = sums + part * part_stride
        weight = exp_real(load_real(at + 4 * value_stride) - top) / total
        for d in range(head_dim):
            store_real(out + 4 * d, load_real(out + 4 * d) + weight * load_real(at + 4 * d))


@jit
def gather_query(query, t, count, head_dim, key_dim, to):
    """Query t of a tile of `count`, to column t of (key_dim, count), padded with zeros."""
    for d in range(head_dim):
        store_real(to + 4 * (d * count + t), load_real(query + 4 * d))
    for d in range(head_dim, key_dim):
        store_real(to + 4 * (d * count + t), np.float32(0))
