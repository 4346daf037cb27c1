"""Attention of one query head over the KV blocks of its sequence.

A block holds 16 tokens. Keys lie dimension-major, (head_dim, 16): a vector is one dimension of 16 tokens, so scores
need no sum across lanes. Values lie token-major, (16, value_stride).
"""

from __future__ import annotations

import numpy as np

from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.simd import (
    exp_f32,
    fma,
    load_f16,
    load_f32,
    load_real,
    max_lanes,
    maximum_f32,
    splat_f32,
    store_f32,
    store_half,
    store_real,
    sum_lanes,
    zero_f32,
)

LOWEST = np.float32(-1e30)  # the score of a token that is not seen


@jit
def load_stored(at, half):
    """16 stored floats, float16 or float32."""
    if half:
        return load_f16(at)
    return load_f32(at)


@jit
def store_key_value(key, value, key_block, value_block, slot, head_dim, value_stride, half):
    """Write one token's key and value head into its slot of a block."""
    if half:
        for d in range(head_dim):
            store_half(key_block + 2 * (16 * d + slot), load_real(key + 4 * d))
            store_half(value_block + 2 * (value_stride * slot + d), load_real(value + 4 * d))
    else:
        for d in range(head_dim):
            store_real(key_block + 4 * (16 * d + slot), load_real(key + 4 * d))
            store_real(value_block + 4 * (value_stride * slot + d), load_real(value + 4 * d))


@jit
def block_scores(query, key_block, head_dim, half):
    """Scores of a query (already scaled) with the 16 keys of a block."""
    size = 32 if half else 64
    a = zero_f32()
    b = zero_f32()
    c = zero_f32()
    d = zero_f32()
    whole = head_dim // 4 * 4
    for i in range(0, whole, 4):
        at = key_block + size * i
        a = fma(load_stored(at, half), splat_f32(load_real(query + 4 * i)), a)
        b = fma(load_stored(at + size, half), splat_f32(load_real(query + 4 * i + 4)), b)
        c = fma(load_stored(at + 2 * size, half), splat_f32(load_real(query + 4 * i + 8)), c)
        d = fma(load_stored(at + 3 * size, half), splat_f32(load_real(query + 4 * i + 12)), d)
    for i in range(whole, head_dim):
        a = fma(load_stored(key_block + size * i, half), splat_f32(load_real(query + 4 * i)), a)
    return (a + b) + (c + d)


@jit
def weigh_values(weights, pool, table, block_stride, first, last, column, value_stride, half, out):
    """out (64 floats) = sum of weight times value columns column..column + 64 of positions first..last."""
    size = 2 if half else 4
    a = zero_f32()
    b = zero_f32()
    c = zero_f32()
    d = zero_f32()
    for position in range(first, last + 1):
        block = table[position // 16]
        at = pool + block * block_stride + size * ((position % 16) * value_stride + column)
        p = splat_f32(load_real(weights + 4 * (position - first // 16 * 16)))
        a = fma(load_stored(at, half), p, a)
        b = fma(load_stored(at + 16 * size, half), p, b)
        c = fma(load_stored(at + 32 * size, half), p, c)
        d = fma(load_stored(at + 48 * size, half), p, d)
    store_f32(out, a)
    store_f32(out + 64, b)
    store_f32(out + 128, c)
    store_f32(out + 192, d)


@jit
def weigh_value_vector(weights, pool, table, block_stride, first, last, column, value_stride, half, out):
    """As `weigh_values`, for 16 columns."""
    size = 2 if half else 4
    total = zero_f32()
    for position in range(first, last + 1):
        at = pool + table[position // 16] * block_stride + size * ((position % 16) * value_stride + column)
        total = fma(load_stored(at, half), splat_f32(load_real(weights + 4 * (position - first // 16 * 16))), total)
    store_f32(out, total)


@jit
def softmax(scores, count):
    """Softmax in place over `count` floats, a multiple of 16."""
    top = splat_f32(LOWEST)
    for i in range(0, 4 * count, 64):
        top = maximum_f32(top, load_f32(scores + i))
    top = splat_f32(max_lanes(top))
    total = zero_f32()
    for i in range(0, 4 * count, 64):
        e = exp_f32(load_f32(scores + i) - top)
        store_f32(scores + i, e)
        total = total + e
    scale = splat_f32(np.float32(1) / sum_lanes(total))
    for i in range(0, 4 * count, 64):
        store_f32(scores + i, load_f32(scores + i) * scale)


@jit
def attend(query, keys, values, table, key_stride, value_block_stride, position, window, sizes, half, out, scratch):
    """One query head at `position` over the cache.

    query: address of head_dim floats, scaled. keys, values: the pools at this layer and KV head. table: block of each
    16 positions. sizes: (head_dim, value_stride). out: address of head_dim floats. scratch: floats for every position
    that may be seen, then value_stride more.
    """
    head_dim, value_stride = sizes
    first = max(0, position - window + 1)
    start = first // 16
    count = (position // 16 + 1 - start) * 16
    for block in range(start, position // 16 + 1):
        scores = block_scores(query, keys + table[block] * key_stride, head_dim, half)
        store_f32(scratch + 64 * (block - start), scores)
    for unseen in range(start * 16, first):
        store_real(scratch + 4 * (unseen - start * 16), LOWEST)
    for unseen in range(position + 1, start * 16 + count):
        store_real(scratch + 4 * (unseen - start * 16), LOWEST)
    softmax(scratch, count)
    result = scratch + 4 * count
    column = 0
    while column + 64 <= value_stride:
        to = result + 4 * column
        weigh_values(scratch, values, table, value_block_stride, first, position, column, value_stride, half, to)
        column += 64
    while column < value_stride:
        to = result + 4 * column
        weigh_value_vector(scratch, values, table, value_block_stride, first, position, column, value_stride, half, to)
        column += 16
    for i in range(head_dim):
        store_real(out + 4 * i, load_real(result + 4 * i))
