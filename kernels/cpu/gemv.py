"""Matrix times vector: dot products of stored rows with one activation vector, in every weight format.

A matrix is seven integers: addresses of its parts, its format and sizes (plan.py). An activation vector is quantised
for q8 and q4, all in one buffer (quantize.py).
"""

from __future__ import annotations

import numpy as np

from svdengine.kernels.cpu.dot import (
    BIAS,
    dot_block_q4,
    dot_block_q8,
    dot_chunk_q4,
    dot_chunk_q8,
    load_f16_pair,
    load_f32_pair,
    load_u8_pair,
)
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.plan import COLUMNS, DATA, F16, F32, FORMAT, MIN, Q4, Q8, ROW, SCALE
from svdengine.kernels.cpu.simd import (
    fma,
    load_bf16,
    load_f16,
    load_f32,
    load_real,
    load_u8_as_f32,
    prefetch,
    store_real,
    sum_lanes,
    zero_f32,
)

# How far ahead of a stream of rows memory is asked for: beyond the 4 KiB page that the hardware's prefetch stops at.
STREAM_AHEAD = 6144
_BIAS = np.float32(BIAS)
_HIGH = np.float32(256)  # what the high plane of activations counts


@jit
def dot_q8(weights, scales, x, columns, ahead):
    """One q8 row times a quantised vector at address x."""
    low = x + columns
    a_scales = low + columns
    a_sums = a_scales + columns // 8
    total = zero_f32()
    bias = zero_f32()
    for _ in range(columns // 512):
        s = load_f16(scales)
        bias = fma(s, load_f32(a_sums), bias)
        total = dot_chunk_q8(total, weights, x, low, s * load_f32(a_scales), weights + ahead)
        weights += 512
        x += 512
        low += 512
        scales += 32
        a_scales += 64
        a_sums += 64
    for _ in range((columns % 512) // 64):
        s = load_f16_pair(scales)
        bias = fma(s, load_f32_pair(a_sums), bias)
        prefetch(weights + ahead)
        total = dot_block_q8(total, weights, x, low, s * load_f32_pair(a_scales))
        weights += 64
        x += 64
        low += 64
        scales += 4
        a_scales += 8
        a_sums += 8
    if BIAS:
        return sum_lanes(total) - _BIAS * sum_lanes(bias)
    return sum_lanes(total)


@jit
def dot_q4(weights, scales, minima, row, x, columns, ahead):
    """One q4 row times the high plane of a quantised vector."""
    a_scales = x + 2 * columns
    a_sums = a_scales + columns // 4
    total = zero_f32()
    low = zero_f32()
    for _ in range(columns // 512):
        low = fma(load_u8_as_f32(minima), load_f32(a_sums), low)
        total = dot_chunk_q4(total, weights, x, load_u8_as_f32(scales) * load_f32(a_scales), weights + ahead)
        weights += 256
        x += 512
        scales += 16
        minima += 16
        a_scales += 64
        a_sums += 64
    for _ in range((columns % 512) // 64):
        low = fma(load_u8_pair(minima), load_f32_pair(a_sums), low)
        prefetch(weights + ahead)
        total = dot_block_q4(total, weights, x, load_u8_pair(scales) * load_f32_pair(a_scales))
        weights += 32
        x += 64
        scales += 2
        minima += 2
        a_scales += 8
        a_sums += 8
    return load_real(row) * _HIGH * sum_lanes(total) - load_real(row + 4) * sum_lanes(low)


@jit
def dot_f32(weights, x, columns):
    """One f32 row times a float32 vector."""
    a = zero_f32()
    b = zero_f32()
    for i in range(0, columns * 4, 128):
        a = fma(load_f32(weights + i), load_f32(x + i), a)
        b = fma(load_f32(weights + i + 64), load_f32(x + i + 64), b)
    return sum_lanes(a + b)


@jit
def dot_f16(weights, x, columns):
    """One f16 row times a float32 vector."""
    a = zero_f32()
    b = zero_f32()
    for i in range(0, columns * 2, 64):
        a = fma(load_f16(weights + i), load_f32(x + 2 * i), a)
        b = fma(load_f16(weights + i + 32), load_f32(x + 2 * i + 64), b)
    return sum_lanes(a + b)


@jit
def dot_bf16(weights, x, columns):
    """One bf16 row times a float32 vector."""
    a = zero_f32()
    b = zero_f32()
    for i in range(0, columns * 2, 64):
        a = fma(load_bf16(weights + i), load_f32(x + 2 * i), a)
        b = fma(load_bf16(weights + i + 32), load_f32(x + 2 * i + 64), b)
    return sum_lanes(a + b)


@jit
def dot_row(matrix, row, x, quantized, ahead):
    """One row of a matrix times one activation row, float32 at x or quantised as the row's format wants it.

    ahead: how many bytes further on memory will be wanted next.
    """
    columns, data, scale = matrix[COLUMNS], matrix[DATA], matrix[SCALE]
    kind = matrix[FORMAT]
    groups = columns // 32
    if kind == Q8:
        return dot_q8(data + row * columns, scale + 2 * row * groups, quantized, columns, ahead)
    if kind == Q4:
        minima, units = matrix[MIN] + row * groups, matrix[ROW] + 8 * row
        return dot_q4(data + row * columns // 2, scale + row * groups, minima, units, quantized, columns, ahead)
    if kind == F32:
        return dot_f32(data + 4 * row * columns, x, columns)
    if kind == F16:
        return dot_f16(data + 2 * row * columns, x, columns)
    return dot_bf16(data + 2 * row * columns, x, columns)


@jit
def gemv(matrix, bias, x, quantized, out, first, last):
    """out[first..last] = rows first..last of a matrix times one activation row, plus bias."""
    for row in range(first, last):
        store_real(out + 4 * row, dot_row(matrix, row, x, quantized, STREAM_AHEAD) + load_real(bias + 4 * row))
