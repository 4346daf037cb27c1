"""Keys and values in 8 bits (kernels/kv_q8.py has the definition), and queries in integers for them.

A block's keys lie by group of 32 dimensions: 8 vectors, each 4 dimensions of 16 tokens, as integer dot products want
them. Its values lie token-major. Scales come after them, (groups, 16 tokens) float16. Scores are made of integers:
queries are two planes of int8 as activations are (quantize.py). Values are weighed in float32: a weight is multiplied
with the token's scale first, once a group.

A query in a tile of n: for each group, n times QUERY bytes: 32 high bytes, 32 low bytes, a float32 scale, and the two
int32 that sums of products start from, which make up for the keys' bias (dot.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types

from svdengine.kernels.cpu.dot import BIAS, emit_bias, emit_dot
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.simd import (
    F16,
    F32,
    F32V,
    I8V,
    I32,
    I32V,
    I64,
    absolute_f32,
    address,
    fma,
    fused,
    half_to_float,
    index,
    load,
    load_f16,
    load_f32,
    load_half,
    load_int,
    load_real,
    loop,
    max_lanes,
    maximum_f32,
    minimum_f32,
    operation,
    round_f32,
    select_greater,
    splat,
    splat_f32,
    store,
    store_f32,
    store_half,
    store_int,
    store_real,
    store_whole_i8,
    sum_lanes,
    zero_f32,
)

GROUP = 32  # as in kernels/kv_q8.py
QUERY = 80  # bytes of a query's group
_SCALE, _HIGH_START, _LOW_START = 64, 68, 72  # in them
_KEYS = 16 * GROUP  # bytes of a group of a block's keys
_SCALES = 32  # of its scales
_LEVELS = np.float32(127)
_BOTH_PLANES = np.float32(127 * 256)
_STEP = np.float32(256)
_ZERO, _ONE = np.float32(0), np.float32(1)
_LARGEST_HALF = np.float32(65504)


@jit
def load_group(x, count, staging):
    """Items 0..count of a head's group, zeros after them: 32 float32 at the address that is returned."""
    if count == GROUP:
        return x
    store_f32(staging, zero_f32())
    store_f32(staging + 64, zero_f32())
    for i in range(count):
        store_real(staging + 4 * i, load_real(x + 4 * i))
    return staging


@jit
def round_group(x, scale_at, levels):
    """Write 32 floats at x as int8 levels, and their scale as float16. What is not finite makes the scale NaN."""
    a, b = load_f32(x), load_f32(x + 64)
    largest = max_lanes(maximum_f32(absolute_f32(a), absolute_f32(b)))
    spoiled = sum_lanes(fma(a, zero_f32(), b * zero_f32()))
    store_half(scale_at, (largest + spoiled) / _LEVELS)
    scale = load_half(scale_at)
    if scale > _ZERO and scale <= _LARGEST_HALF:
        top, step = splat_f32(_LEVELS), splat_f32(scale)
        a = maximum_f32(minimum_f32(round_f32(a / step), top), zero_f32() - top)
        b = maximum_f32(minimum_f32(round_f32(b / step), top), zero_f32() - top)
    else:
        a, b = zero_f32(), zero_f32()
    store_whole_i8(levels, a)
    store_whole_i8(levels + 16, b)


@jit
def store_q8(key, value, offset, factor, key_block, value_block, slot, head_dim, key_dim, value_stride, scratch):
    """Write one token's key head, less offset and divided by factor (key_dim), and its value head into a block."""
    levels, staging = scratch, scratch + 64
    groups = key_dim // GROUP
    key_scales, value_scales = key_block + 16 * key_dim, value_block + 16 * value_stride
    for g in range(groups):
        count = min(GROUP, head_dim - GROUP * g)
        at = 2 * (16 * g + slot)
        x = load_group(key + 4 * GROUP * g, count, staging)
        for half in range(4 * GROUP * g, 4 * GROUP * (g + 1), 64):
            shaped = (load_f32(x + half - 4 * GROUP * g) - load_f32(offset + half)) / load_f32(factor + half)
            store_f32(staging + half - 4 * GROUP * g, shaped)
        round_group(staging, key_scales + at, levels)
        for i in range(8):
            store_int(key_block + _KEYS * g + 64 * i + 4 * slot, load_int(levels + 4 * i))
        round_group(load_group(value + 4 * GROUP * g, count, staging), value_scales + at, levels)
        for i in range(0, min(GROUP, value_stride - GROUP * g), 4):
            store_int(value_block + slot * value_stride + GROUP * g + i, load_int(levels + i))


@jit
def gather_q8(query, t, count, head_dim, key_dim, factor, to, staging):
    """Query t of a tile of `count`, in integers, times what keys were divided by."""
    for g in range(key_dim // GROUP):
        at = to + QUERY * (g * count + t)
        x = load_group(query + 4 * GROUP * g, min(GROUP, head_dim - GROUP * g), staging)
        more = factor + 4 * GROUP * g
        a, b = load_f32(x) * load_f32(more), load_f32(x + 64) * load_f32(more + 64)
        scale = max_lanes(maximum_f32(absolute_f32(a), absolute_f32(b))) / _BOTH_PLANES
        inverse = splat_f32(_ONE / scale if scale > _ZERO else _ZERO)
        a, b = round_f32(a * inverse), round_f32(b * inverse)
        high_a, high_b = round_f32(a * splat_f32(_ONE / _STEP)), round_f32(b * splat_f32(_ONE / _STEP))
        top = splat_f32(_LEVELS)  # 128 does not fit: half a step, as in quantize.py
        low_a, low_b = fma(high_a, splat_f32(-_STEP), a), fma(high_b, splat_f32(-_STEP), b)
        low_a, low_b = minimum_f32(low_a, top), minimum_f32(low_b, top)
        low_a, low_b = maximum_f32(low_a, zero_f32() - top), maximum_f32(low_b, zero_f32() - top)
        store_whole_i8(at, high_a)
        store_whole_i8(at + 16, high_b)
        store_whole_i8(at + 32, low_a)
        store_whole_i8(at + 48, low_b)
        store_real(at + _SCALE, scale)
        store_int(at + _HIGH_START, -BIAS * np.int64(sum_lanes(high_a + high_b)))
        store_int(at + _LOW_START, -BIAS * np.int64(sum_lanes(low_a + low_b)))


def _spread_word(builder, at, offset):
    """4 bytes in every lane."""
    return splat(builder, load(builder, at, I32, offset))


def score_tile(count: int) -> Any:
    """scores[t, 0..16] of `count` queries with the keys of a block."""

    @operation(types.void, address, address, index, address, index)
    def tile(builder, queries, keys, groups, scores, stride):
        """stride: bytes from query to query."""
        scales = builder.add(keys, builder.mul(groups, ir.Constant(I64, _KEYS)))

        def group(g, totals):
            at = builder.add(keys, builder.mul(g, ir.Constant(I64, _KEYS)))
            query = builder.add(queries, builder.mul(g, ir.Constant(I64, QUERY * count)))
            half = load(builder, builder.add(scales, builder.mul(g, ir.Constant(I64, _SCALES))), ir.VectorType(F16, 16))
            scale = half_to_float(builder, half)
            high = [_spread_word(builder, query, QUERY * t + _HIGH_START) for t in range(count)]
            low = [_spread_word(builder, query, QUERY * t + _LOW_START) for t in range(count)]
            for step in range(8):
                key = emit_bias(builder, load(builder, at, I8V, 64 * step))
                for t in range(count):
                    word = QUERY * t + 4 * step
                    high[t] = emit_dot(builder, high[t], key, _as_bytes(builder, _spread_word(builder, query, word)))
                    low[t] = emit_dot(builder, low[t], key, _as_bytes(builder, _spread_word(builder, query, word + 32)))
            results = []
            for t in range(count):
                whole = builder.add(builder.shl(high[t], ir.Constant(I32V, [8] * 16)), low[t])
                both = builder.fmul(scale, splat(builder, load(builder, query, F32, QUERY * t + _SCALE)))
                results.append(fused(builder, builder.sitofp(whole, F32V), both, totals[t]))
            return results

        totals = loop(builder, groups, [ir.Constant(F32V, [0.0] * 16)] * count, group)
        for t in range(count):
            store(builder, builder.add(scores, builder.mul(stride, ir.Constant(I64, t))), totals[t])

    return tile


def _as_bytes(builder, words):
    return builder.bitcast(words, I8V)


@jit
def weigh_scales(count, weights, stride, scales, groups, out):
    """out (count, groups, 16) = each query's weights of 16 tokens times the tokens' scales; 0 where the weight is.

    stride: bytes from query to query. Scales of slots that no query sees may be anything.
    """
    for g in range(groups):
        scale = load_f16(scales + _SCALES * g)
        for t in range(count):
            weight = load_f32(weights + t * stride)
            store_f32(out + 64 * (t * groups + g), select_greater(weight, zero_f32(), weight * scale, zero_f32()))


scores_1_q8, scores_2_q8, scores_3_q8, scores_4_q8 = (score_tile(t) for t in (1, 2, 3, 4))
