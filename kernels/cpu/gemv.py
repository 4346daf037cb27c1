"""Matrix times vector: dot products of stored rows with one activation vector, in every weight format.

A matrix is seven integers: addresses of its parts, its format and sizes (plan.py). An activation vector is quantised
for q8 and q4: int8 values, and per group of 32 a scale and scale * sum of values, all in one buffer (quantize.py).
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
from svdengine.kernels.cpu.gemm import load_weights
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.plan import COLUMNS, DATA, F16, F32, FORMAT, MIN, Q4, Q8, ROW, SCALE
from svdengine.kernels.cpu.simd import (
    fma,
    load_bf16,
    load_f16,
    load_f32,
    load_real,
    load_u8_as_f32,
    splat_f32,
    store_f32,
    store_real,
    sum_lanes,
    zero_f32,
)

_BIAS = np.float32(BIAS)


@jit
def dot_q8(weights, scales, x, columns):
    """One q8 row times a quantised vector. x: address of the values; scales and sums follow them."""
    a_scales = x + columns
    a_sums = a_scales + columns // 8
    total = zero_f32()
    bias = zero_f32()
    for _ in range(columns // 512):
        s = load_f16(scales)
        bias = fma(s, load_f32(a_sums), bias)
        total = dot_chunk_q8(total, weights, x, s * load_f32(a_scales))
        weights += 512
        x += 512
        scales += 32
        a_scales += 64
        a_sums += 64
    for _ in range((columns % 512) // 64):
        s = load_f16_pair(scales)
        bias = fma(s, load_f32_pair(a_sums), bias)
        total = dot_block_q8(total, weights, x, s * load_f32_pair(a_scales))
        weights += 64
        x += 64
        scales += 4
        a_scales += 8
        a_sums += 8
    if BIAS:
        return sum_lanes(total) - _BIAS * sum_lanes(bias)
    return sum_lanes(total)


@jit
def dot_q4(weights, scales, minima, row, x, columns):
    """One q4 row times a quantised vector."""
    a_scales = x + columns
    a_sums = a_scales + columns // 8
    total = zero_f32()
    low = zero_f32()
    for _ in range(columns // 512):
        low = fma(load_u8_as_f32(minima), load_f32(a_sums), low)
        total = dot_chunk_q4(total, weights, x, load_u8_as_f32(scales) * load_f32(a_scales))
        weights += 256
        x += 512
        scales += 16
        minima += 16
        a_scales += 64
        a_sums += 64
    for _ in range((columns % 512) // 64):
        low = fma(load_u8_pair(minima), load_f32_pair(a_sums), low)
        total = dot_block_q4(total, weights, x, load_u8_pair(scales) * load_f32_pair(a_scales))
        weights += 32
        x += 64
        scales += 2
        minima += 2
        a_scales += 8
        a_sums += 8
    return load_real(row) * sum_lanes(total) - load_real(row + 4) * sum_lanes(low)


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
def gemv(matrix, bias, x, quantized, out, first, last):
    """out[first..last] = rows first..last of a matrix times one activation row, plus bias."""
    columns, data, scale = matrix[COLUMNS], matrix[DATA], matrix[SCALE]
    kind = matrix[FORMAT]
    groups = columns // 32
    for r in range(first, last):
        if kind == Q8:
            y = dot_q8(data + r * columns, scale + 2 * r * groups, quantized, columns)
        elif kind == Q4:
            row = matrix[ROW] + 8 * r
            y = dot_q4(data + r * columns // 2, scale + r * groups, matrix[MIN] + r * groups, row, quantized, columns)
        elif kind == F32:
            y = dot_f32(data + 4 * r * columns, x, columns)
        elif kind == F16:
            y = dot_f16(data + 2 * r * columns, x, columns)
        else:
            y = dot_bf16(data + 2 * r * columns, x, columns)
        store_real(out + 4 * r, y + load_real(bias + 4 * r))


@jit
def add_neurons(matrix, bias, hidden, out, columns, first, last, with_bias):
    """out = sum over neurons first..last of hidden[i] times row i of a neuron-major matrix (+ bias)."""
    for c in range(0, columns, 16):
        store_f32(out + 4 * c, load_f32(bias + 4 * c) if with_bias else zero_f32())
    for row in range(first, last):
        h = splat_f32(load_real(hidden + 4 * row))
        for c in range(0, columns, 16):
            at = out + 4 * c
            store_f32(at, fma(load_weights(matrix, row, c), h, load_f32(at)))
