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
from svdengine.kernels.cpu.model import COLUMNS, DATA, F16, F32, FORMAT, MIN, Q4, Q8, ROW, SCALE
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
def part_q8(total, bias, w, s, x, low, a_scales, a_sums, w_ahead, s_ahead):
    """The next 512 columns of a q8 row: both of its running sums. ahead: bytes to what will be wanted next."""
    scale = load_f16(s)
    prefetch(s + s_ahead)
    bias = fma(scale, load_f32(a_sums), bias)
    return dot_chunk_q8(total, w, x, low, scale * load_f32(a_scales), w + w_ahead), bias


@jit
def last_part_q8(total, bias, w, s, x, low, a_scales, a_sums, w_ahead, s_ahead):
    """As `part_q8`, for 64 columns."""
    scale = load_f16_pair(s)
    prefetch(w + w_ahead)
    prefetch(s + s_ahead)
    bias = fma(scale, load_f32_pair(a_sums), bias)
    return dot_block_q8(total, w, x, low, scale * load_f32_pair(a_scales)), bias


@jit
def sum_q8(total, bias):
    """A q8 row's product from its running sums."""
    if BIAS:
        return sum_lanes(total) - _BIAS * sum_lanes(bias)
    return sum_lanes(total)


@jit
def dot_four_q8(matrix, r0, r1, r2, r3, n0, n1, n2, n3, x, out):
    """`dot_four` for q8."""
    columns, groups = matrix[COLUMNS], matrix[COLUMNS] // 16  # bytes of a row and of its scales
    w0, w1 = matrix[DATA] + r0 * columns, matrix[DATA] + r1 * columns
    w2, w3 = matrix[DATA] + r2 * columns, matrix[DATA] + r3 * columns
    s0, s1 = matrix[SCALE] + r0 * groups, matrix[SCALE] + r1 * groups
    s2, s3 = matrix[SCALE] + r2 * groups, matrix[SCALE] + r3 * groups
    d0, d1, d2, d3 = (n0 - r0) * columns, (n1 - r1) * columns, (n2 - r2) * columns, (n3 - r3) * columns
    e0, e1, e2, e3 = (n0 - r0) * groups, (n1 - r1) * groups, (n2 - r2) * groups, (n3 - r3) * groups
    low, scales = x + columns, x + 2 * columns
    sums = scales + columns // 8
    t0, t1, t2, t3 = zero_f32(), zero_f32(), zero_f32(), zero_f32()
    b0, b1, b2, b3 = zero_f32(), zero_f32(), zero_f32(), zero_f32()
    whole = columns // 512 * 512
    for c in range(0, whole, 512):
        p, q, a, b, g = x + c, low + c, scales + c // 8, sums + c // 8, c // 16
        t0, b0 = part_q8(t0, b0, w0 + c, s0 + g, p, q, a, b, d0, e0)
        t1, b1 = part_q8(t1, b1, w1 + c, s1 + g, p, q, a, b, d1, e1)
        t2, b2 = part_q8(t2, b2, w2 + c, s2 + g, p, q, a, b, d2, e2)
        t3, b3 = part_q8(t3, b3, w3 + c, s3 + g, p, q, a, b, d3, e3)
    for c in range(whole, columns, 64):
        p, q, a, b, g = x + c, low + c, scales + c // 8, sums + c // 8, c // 16
        t0, b0 = last_part_q8(t0, b0, w0 + c, s0 + g, p, q, a, b, d0, e0)
        t1, b1 = last_part_q8(t1, b1, w1 + c, s1 + g, p, q, a, b, d1, e1)
        t2, b2 = last_part_q8(t2, b2, w2 + c, s2 + g, p, q, a, b, d2, e2)
        t3, b3 = last_part_q8(t3, b3, w3 + c, s3 + g, p, q, a, b, d3, e3)
    store_real(out, sum_q8(t0, b0))
    store_real(out + 4, sum_q8(t1, b1))
    store_real(out + 8, sum_q8(t2, b2))
    store_real(out + 12, sum_q8(t3, b3))


@jit
def part_q4(total, low, w, s, m, x, a_scales, a_sums, w_ahead, s_ahead):
    """The next 512 columns of a q4 row: both of its running sums. ahead: bytes to what will be wanted next."""
    prefetch(s + s_ahead)
    prefetch(m + s_ahead)
    low = fma(load_u8_as_f32(m), load_f32(a_sums), low)
    return dot_chunk_q4(total, w, x, load_u8_as_f32(s) * load_f32(a_scales), w + w_ahead), low


@jit
def last_part_q4(total, low, w, s, m, x, a_scales, a_sums, w_ahead, s_ahead):
    """As `part_q4`, for 64 columns."""
    prefetch(w + w_ahead)
    prefetch(s + s_ahead)
    prefetch(m + s_ahead)
    low = fma(load_u8_pair(m), load_f32_pair(a_sums), low)
    return dot_block_q4(total, w, x, load_u8_pair(s) * load_f32_pair(a_scales)), low


@jit
def sum_q4(total, low, unit):
    """A q4 row's product from its running sums; unit: address of the row's two units."""
    return load_real(unit) * _HIGH * sum_lanes(total) - load_real(unit + 4) * sum_lanes(low)


@jit
def dot_four_q4(matrix, r0, r1, r2, r3, n0, n1, n2, n3, x, out):
    """`dot_four` for q4."""
    columns = matrix[COLUMNS]
    size, groups, minima = columns // 2, columns // 32, matrix[MIN] - matrix[SCALE]  # of a row and of its scales
    w0, w1 = matrix[DATA] + r0 * size, matrix[DATA] + r1 * size
    w2, w3 = matrix[DATA] + r2 * size, matrix[DATA] + r3 * size
    s0, s1 = matrix[SCALE] + r0 * groups, matrix[SCALE] + r1 * groups
    s2, s3 = matrix[SCALE] + r2 * groups, matrix[SCALE] + r3 * groups
    d0, d1, d2, d3 = (n0 - r0) * size, (n1 - r1) * size, (n2 - r2) * size, (n3 - r3) * size
    e0, e1, e2, e3 = (n0 - r0) * groups, (n1 - r1) * groups, (n2 - r2) * groups, (n3 - r3) * groups
    scales = x + 2 * columns
    sums = scales + columns // 4  # those of the high plane
    t0, t1, t2, t3 = zero_f32(), zero_f32(), zero_f32(), zero_f32()
    b0, b1, b2, b3 = zero_f32(), zero_f32(), zero_f32(), zero_f32()
    whole = columns // 512 * 512
    for c in range(0, whole, 512):
        p, a, b, h, g = x + c, scales + c // 8, sums + c // 8, c // 2, c // 32
        t0, b0 = part_q4(t0, b0, w0 + h, s0 + g, s0 + g + minima, p, a, b, d0, e0)
        t1, b1 = part_q4(t1, b1, w1 + h, s1 + g, s1 + g + minima, p, a, b, d1, e1)
        t2, b2 = part_q4(t2, b2, w2 + h, s2 + g, s2 + g + minima, p, a, b, d2, e2)
        t3, b3 = part_q4(t3, b3, w3 + h, s3 + g, s3 + g + minima, p, a, b, d3, e3)
    for c in range(whole, columns, 64):
        p, a, b, h, g = x + c, scales + c // 8, sums + c // 8, c // 2, c // 32
        t0, b0 = last_part_q4(t0, b0, w0 + h, s0 + g, s0 + g + minima, p, a, b, d0, e0)
        t1, b1 = last_part_q4(t1, b1, w1 + h, s1 + g, s1 + g + minima, p, a, b, d1, e1)
        t2, b2 = last_part_q4(t2, b2, w2 + h, s2 + g, s2 + g + minima, p, a, b, d2, e2)
        t3, b3 = last_part_q4(t3, b3, w3 + h, s3 + g, s3 + g + minima, p, a, b, d3, e3)
    unit = matrix[ROW]
    store_real(out, sum_q4(t0, b0, unit + 8 * r0))
    store_real(out + 4, sum_q4(t1, b1, unit + 8 * r1))
    store_real(out + 8, sum_q4(t2, b2, unit + 8 * r2))
    store_real(out + 12, sum_q4(t3, b3, unit + 8 * r3))


@jit
def dot_four(matrix, r0, r1, r2, r3, n0, n1, n2, n3, x, quantized, out):
    """out[0..4] = rows r0..r3 of a matrix times one activation row, bit for bit as `dot_row` has them.

    Rows that lie apart come faster from memory four at a time. n0..n3: rows that will be wanted next, which are asked
    for on the way.
    """
    kind = matrix[FORMAT]
    if kind == Q8:
        dot_four_q8(matrix, r0, r1, r2, r3, n0, n1, n2, n3, quantized, out)
    elif kind == Q4:
        dot_four_q4(matrix, r0, r1, r2, r3, n0, n1, n2, n3, quantized, out)
    else:
        store_real(out, dot_row(matrix, r0, x, quantized, 0))
        store_real(out + 4, dot_row(matrix, r1, x, quantized, 0))
        store_real(out + 8, dot_row(matrix, r2, x, quantized, 0))
        store_real(out + 12, dot_row(matrix, r3, x, quantized, 0))


@jit
def gemv_few(matrix, bias, x, x_stride, quantized, quantized_stride, n, out, out_stride, first, last):
    """As `gemv` for a few activation rows: each stored row is read from memory once, and then found in the cache."""
    for row in range(first, last):
        add = load_real(bias + 4 * row)
        ahead = STREAM_AHEAD
        for i in range(n):
            value = dot_row(matrix, row, x + i * x_stride, quantized + i * quantized_stride, ahead)
            store_real(out + i * out_stride + 4 * row, value + add)
            ahead = 0


@jit
def gemv(matrix, bias, x, quantized, out, first, last):
    """out[first..last] = rows first..last of a matrix times one activation row, plus bias."""
    for row in range(first, last):
        store_real(out + 4 * row, dot_row(matrix, row, x, quantized, STREAM_AHEAD) + load_real(bias + 4 * row))
