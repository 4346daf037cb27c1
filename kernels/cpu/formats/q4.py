"""q4: four bits a weight with a scale and a minimum a group, multiplied with the high plane of activations alone."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import types

from svdengine.kernels.cpu.dot import BLOCK, CHUNK, emit_dot, emit_nibbles, emit_scaled, load_f32_pair, load_u8_pair
from svdengine.kernels.cpu.formats.kernels import PANEL, FormatKernels, columns_by
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.matrix import COLUMNS, DATA, MIN, ROW, ROWS, SCALE
from svdengine.kernels.cpu.simd import (
    F32V,
    I8,
    I8V,
    I32V,
    I64,
    address,
    emit_prefetch,
    f32x16,
    fma,
    fused,
    index,
    load,
    load_f32,
    load_real,
    load_u8_as_f32,
    load_u8_as_real,
    loop,
    operation,
    prefetch,
    real,
    splat,
    splat_f32,
    store,
    store_f32,
    store_real,
    sum_lanes,
    zero_f32,
)
from svdengine.kernels.cpu.tile import transpose_words

_HIGH = np.float32(256)  # what the high plane of activations counts
_ZERO = np.float32(0)


@operation(f32x16, f32x16, address, address, f32x16, address)
def dot_chunk(builder, total, weights, activations, scales, ahead):
    """total + scaled products of 512 columns, less the minima's term; see scaled.py."""
    zero = ir.Constant(I32V, [0] * 16)
    for block in range(CHUNK // BLOCK):
        if block % 2 == 0:
            emit_prefetch(builder, builder.add(ahead, ir.Constant(I64, block * BLOCK // 2)))
        w = emit_nibbles(builder, weights, block * BLOCK // 2)
        dots = emit_dot(builder, zero, w, load(builder, activations, I8V, block * BLOCK))
        total = emit_scaled(builder, total, dots, scales, block)
    return total


@operation(f32x16, f32x16, address, address, f32x16)
def dot_block(builder, total, weights, activations, scales):
    """As `dot_chunk`, for 64 columns; the scales are those of the first two lanes."""
    zero = ir.Constant(I32V, [0] * 16)
    w = emit_nibbles(builder, weights)
    return emit_scaled(builder, total, emit_dot(builder, zero, w, load(builder, activations, I8V)), scales, 0)


@operation(f32x16, address, address)
def load_nibbles(builder, at, shift):
    """16 bytes' low halves (shift 0) or high halves (shift 4), converted."""
    packed = load(builder, at, ir.VectorType(I8, 16))
    packed = builder.lshr(packed, splat(builder, builder.trunc(shift, I8)))
    return builder.uitofp(builder.and_(packed, ir.Constant(packed.type, [15] * 16)), F32V)


@operation(types.void, address, address)
def unpack_nibbles(builder, to, at):
    """32 packed bytes to 64 bytes in 0..15."""
    store(builder, to, emit_nibbles(builder, at))


@operation(
    types.void, address, address, address, address, address, address, address, address, address, index,
    real, real, real, real, real, real, real, real, index,
)  # fmt: skip
def add_rows(builder, out, w0, w1, w2, w3, s0, s1, s2, s3, minima, h0, h1, h2, h3, m0, m1, m2, m3, blocks):
    """The sum of four weighted rows; h: weights times the rows' units of scale, m: times those of the minima.

    minima: bytes from a row's scales to its minima.
    """

    def body(i, _):
        to = builder.add(out, builder.mul(i, ir.Constant(I64, 256)))
        columns, groups = builder.mul(i, ir.Constant(I64, 32)), builder.mul(i, ir.Constant(I64, 2))
        totals = [load(builder, to, F32V, 64 * v) for v in range(4)]
        rows = zip((w0, w1, w2, w3), (s0, s1, s2, s3), (h0, h1, h2, h3), (m0, m1, m2, m3), strict=True)
        for w, s, h, m in rows:
            at, scales = builder.add(w, columns), builder.add(s, groups)
            for half in range(2):
                scale = builder.uitofp(load(builder, scales, I8, half), ir.FloatType())
                low = builder.uitofp(load(builder, builder.add(scales, minima), I8, half), ir.FloatType())
                weight, lowest = splat(builder, builder.fmul(scale, h)), splat(builder, builder.fmul(low, m))
                for v in range(2):
                    packed = load(builder, at, ir.VectorType(I8, 16), 16 * v)
                    if half:
                        packed = builder.lshr(packed, ir.Constant(packed.type, [4] * 16))
                    else:
                        packed = builder.and_(packed, ir.Constant(packed.type, [15] * 16))
                    target = 2 * half + v
                    total = fused(builder, builder.uitofp(packed, F32V), weight, totals[target])
                    totals[target] = builder.fsub(total, lowest)
        for v in range(4):
            store(builder, builder.add(to, ir.Constant(I64, 64 * v)), totals[v])
        return []

    loop(builder, blocks, [], body)


@jit
def whole(total, low, unit):
    """A row's product from its running sums; unit: address of the row's two units."""
    return load_real(unit) * _HIGH * sum_lanes(total) - load_real(unit + 4) * sum_lanes(low)


@jit
def dot_row(matrix, row, x, quantized, ahead):
    """See FormatKernels."""
    columns = matrix[COLUMNS]
    groups = columns // 32
    weights, scales, minima = (
        matrix[DATA] + row * columns // 2,
        matrix[SCALE] + row * groups,
        matrix[MIN] + row * groups,
    )
    a_scales = quantized + 2 * columns
    a_sums = a_scales + columns // 4  # those of the high plane
    total = zero_f32()
    low = zero_f32()
    for _ in range(columns // 512):
        low = fma(load_u8_as_f32(minima), load_f32(a_sums), low)
        total = dot_chunk(total, weights, quantized, load_u8_as_f32(scales) * load_f32(a_scales), weights + ahead)
        weights += 256
        quantized += 512
        scales += 16
        minima += 16
        a_scales += 64
        a_sums += 64
    for _ in range((columns % 512) // 64):
        low = fma(load_u8_pair(minima), load_f32_pair(a_sums), low)
        prefetch(weights + ahead)
        total = dot_block(total, weights, quantized, load_u8_pair(scales) * load_f32_pair(a_scales))
        weights += 32
        quantized += 64
        scales += 2
        minima += 2
        a_scales += 8
        a_sums += 8
    return whole(total, low, matrix[ROW] + 8 * row)


@jit
def part(total, low, w, s, m, x, a_scales, a_sums, w_ahead, s_ahead):
    """The next 512 columns of a row: both of its running sums. ahead: bytes to what will be wanted next."""
    prefetch(s + s_ahead)
    prefetch(m + s_ahead)
    low = fma(load_u8_as_f32(m), load_f32(a_sums), low)
    return dot_chunk(total, w, x, load_u8_as_f32(s) * load_f32(a_scales), w + w_ahead), low


@jit
def last_part(total, low, w, s, m, x, a_scales, a_sums, w_ahead, s_ahead):
    """As `part`, for 64 columns."""
    prefetch(w + w_ahead)
    prefetch(s + s_ahead)
    prefetch(m + s_ahead)
    low = fma(load_u8_pair(m), load_f32_pair(a_sums), low)
    return dot_block(total, w, x, load_u8_pair(s) * load_f32_pair(a_scales)), low


@jit
def dot_four(matrix, r0, r1, r2, r3, n0, n1, n2, n3, x, quantized, out):
    """See FormatKernels."""
    columns = matrix[COLUMNS]
    size, groups, minima = columns // 2, columns // 32, matrix[MIN] - matrix[SCALE]  # of a row and of its scales
    w0, w1 = matrix[DATA] + r0 * size, matrix[DATA] + r1 * size
    w2, w3 = matrix[DATA] + r2 * size, matrix[DATA] + r3 * size
    s0, s1 = matrix[SCALE] + r0 * groups, matrix[SCALE] + r1 * groups
    s2, s3 = matrix[SCALE] + r2 * groups, matrix[SCALE] + r3 * groups
    d0, d1, d2, d3 = (n0 - r0) * size, (n1 - r1) * size, (n2 - r2) * size, (n3 - r3) * size
    e0, e1, e2, e3 = (n0 - r0) * groups, (n1 - r1) * groups, (n2 - r2) * groups, (n3 - r3) * groups
    scales = quantized + 2 * columns
    sums = scales + columns // 4
    t0, t1, t2, t3 = zero_f32(), zero_f32(), zero_f32(), zero_f32()
    b0, b1, b2, b3 = zero_f32(), zero_f32(), zero_f32(), zero_f32()
    chunks = columns // 512 * 512
    for c in range(0, chunks, 512):
        p, a, b, h, g = quantized + c, scales + c // 8, sums + c // 8, c // 2, c // 32
        t0, b0 = part(t0, b0, w0 + h, s0 + g, s0 + g + minima, p, a, b, d0, e0)
        t1, b1 = part(t1, b1, w1 + h, s1 + g, s1 + g + minima, p, a, b, d1, e1)
        t2, b2 = part(t2, b2, w2 + h, s2 + g, s2 + g + minima, p, a, b, d2, e2)
        t3, b3 = part(t3, b3, w3 + h, s3 + g, s3 + g + minima, p, a, b, d3, e3)
    for c in range(chunks, columns, 64):
        p, a, b, h, g = quantized + c, scales + c // 8, sums + c // 8, c // 2, c // 32
        t0, b0 = last_part(t0, b0, w0 + h, s0 + g, s0 + g + minima, p, a, b, d0, e0)
        t1, b1 = last_part(t1, b1, w1 + h, s1 + g, s1 + g + minima, p, a, b, d1, e1)
        t2, b2 = last_part(t2, b2, w2 + h, s2 + g, s2 + g + minima, p, a, b, d2, e2)
        t3, b3 = last_part(t3, b3, w3 + h, s3 + g, s3 + g + minima, p, a, b, d3, e3)
    unit = matrix[ROW]
    store_real(out, whole(t0, b0, unit + 8 * r0))
    store_real(out + 4, whole(t1, b1, unit + 8 * r1))
    store_real(out + 8, whole(t2, b2, unit + 8 * r2))
    store_real(out + 12, whole(t3, b3, unit + 8 * r3))


@jit
def add_four(matrix, r0, r1, r2, r3, h0, h1, h2, h3, out, first, last):
    """See FormatKernels."""
    columns = matrix[COLUMNS]
    data, scale, groups, half = matrix[DATA] + first // 2, matrix[SCALE] + first // 32, columns // 32, columns // 2
    unit = matrix[ROW]
    u0, u1, u2, u3 = unit + 8 * r0, unit + 8 * r1, unit + 8 * r2, unit + 8 * r3
    add_rows(
        out + 4 * first, data + r0 * half, data + r1 * half, data + r2 * half, data + r3 * half,
        scale + r0 * groups, scale + r1 * groups, scale + r2 * groups, scale + r3 * groups,
        matrix[MIN] - matrix[SCALE],
        h0 * load_real(u0), h1 * load_real(u1), h2 * load_real(u2), h3 * load_real(u3),
        h0 * load_real(u0 + 4), h1 * load_real(u1 + 4), h2 * load_real(u2 + 4), h3 * load_real(u3 + 4),
        (last - first) // 64,
    )  # fmt: skip


@jit
def load_weights(matrix, row, column):
    """See FormatKernels."""
    at = row * matrix[COLUMNS] + column
    block, within = at // 64 * 64, column % 64
    q = load_nibbles(matrix[DATA] + block // 2 + within % 32, within // 32 * 4)
    scale = load_real(matrix[ROW] + 8 * row) * load_u8_as_real(matrix[SCALE] + at // 32)
    low = load_real(matrix[ROW] + 8 * row + 4) * load_u8_as_real(matrix[MIN] + at // 32)
    return q * splat_f32(scale) - splat_f32(low)


@jit
def pack_panel(matrix, first, start, stop, panel, staging):
    """See FormatKernels."""
    columns, rows = matrix[COLUMNS], matrix[ROWS]
    for lane in range(PANEL):
        row = first + lane
        present = row < rows
        row = min(row, rows - 1)
        groups, unit = row * (columns // 32), matrix[ROW] + 8 * row
        for group in range(start // 32, stop // 32):
            scale = _ZERO
            low = _ZERO
            if present:
                scale = load_real(unit) * load_u8_as_real(matrix[SCALE] + groups + group)
                low = -load_real(unit + 4) * load_u8_as_real(matrix[MIN] + groups + group)
            store_real(panel + 640 * (group - start // 32) + 4 * lane, scale)
            store_real(panel + 640 * (group - start // 32) + 64 + 4 * lane, low)
    for column in range(start, stop, 64):
        for lane in range(PANEL):
            row = min(first + lane, rows - 1)
            unpack_nibbles(staging + 64 * lane, matrix[DATA] + (row * columns + column) // 2)
        transpose_words(staging, 64, staging + 1024)
        for step in range(16):
            to = panel + 640 * ((column - start) // 32 + step // 8) + 128 + 64 * (step % 8)
            store_f32(to, load_f32(staging + 1024 + 64 * step))


Q4_KERNELS = FormatKernels("q4", dot_row, dot_four, add_four, load_weights, pack_panel, columns_by(load_weights))
