"""q8: int8 weights with a float16 scale a group, multiplied with both planes of the activations.

Where the integer product wants its weights unsigned, they are offset by BIAS in the register (dot.py), and sum(w * a) =
sum((w + BIAS) * a) - BIAS * sum(a), whose last sum is made once for all rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types

from svdengine.kernels.cpu.dot import (
    BIAS,
    BLOCK,
    CHUNK,
    emit_bias,
    emit_dot_16,
    emit_scaled,
    load_f16_pair,
    load_f32_pair,
)
from svdengine.kernels.cpu.formats.kernels import PANEL, FormatKernels, columns_by
from svdengine.kernels.cpu.formats.sums import RowSums, add_whole, adding, finishing, pack_planes
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.matrix import COLUMNS, DATA, ROWS, SCALE
from svdengine.kernels.cpu.simd import (
    F32V,
    I8,
    I8V,
    I64,
    address,
    emit_prefetch,
    f32x16,
    fma,
    load,
    load_f16,
    load_f32,
    load_half,
    load_int,
    load_real,
    operation,
    prefetch,
    splat_f32,
    store,
    store_f32,
    store_real,
    sum_lanes,
    zero_f32,
)
from svdengine.kernels.cpu.tile import pack_words

_BIAS = np.float32(BIAS)
_ZERO = np.float32(0)


@operation(f32x16, f32x16, address, address, address, f32x16, address)
def dot_chunk(builder, total, weights, high, low, scales, ahead):
    """total + scaled products of 512 columns of weights, less the bias' term. scales: of both sides, by group.

    ahead: address of as many bytes that will be wanted next; the hardware alone does not fetch far enough ahead.
    """
    for block in range(CHUNK // BLOCK):
        offset = ir.Constant(I64, block * BLOCK)
        emit_prefetch(builder, builder.add(ahead, offset))
        w = emit_bias(builder, load(builder, weights, I8V, block * BLOCK))
        dots = emit_dot_16(builder, w, builder.add(high, offset), builder.add(low, offset))
        total = emit_scaled(builder, total, dots, scales, block)
    return total


@operation(f32x16, f32x16, address, address, address, f32x16)
def dot_block(builder, total, weights, high, low, scales):
    """As `dot_chunk`, for 64 columns; the scales are those of the first two lanes."""
    w = emit_bias(builder, load(builder, weights, I8V))
    return emit_scaled(builder, total, emit_dot_16(builder, w, high, low), scales, 0)


@operation(f32x16, address)
def load_sixteen(builder, at):
    """16 signed bytes, converted."""
    return builder.sitofp(load(builder, at, ir.VectorType(I8, 16)), F32V)


@operation(types.void, address, address)
def copy_biased(builder, to, at):
    """64 int8 weights to 64 bytes as `emit_dot` wants them."""
    store(builder, to, emit_bias(builder, load(builder, at, I8V)))


@jit
def whole(total, below):
    """A row's product from its running sums."""
    if BIAS:
        return sum_lanes(total) - _BIAS * sum_lanes(below)
    return sum_lanes(total)


@jit
def dot_row(matrix, row, x, quantized, ahead):
    """See FormatKernels."""
    columns = matrix[COLUMNS]
    weights, scales = matrix[DATA] + row * columns, matrix[SCALE] + row * (columns // 16)
    high, low = quantized, quantized + columns
    a_scales = low + columns
    a_sums = a_scales + columns // 8
    total = zero_f32()
    below = zero_f32()
    for _ in range(columns // 512):
        s = load_f16(scales)
        below = fma(s, load_f32(a_sums), below)
        total = dot_chunk(total, weights, high, low, s * load_f32(a_scales), weights + ahead)
        weights += 512
        high += 512
        low += 512
        scales += 32
        a_scales += 64
        a_sums += 64
    for _ in range((columns % 512) // 64):
        s = load_f16_pair(scales)
        below = fma(s, load_f32_pair(a_sums), below)
        prefetch(weights + ahead)
        total = dot_block(total, weights, high, low, s * load_f32_pair(a_scales))
        weights += 64
        high += 64
        low += 64
        scales += 4
        a_scales += 8
        a_sums += 8
    return whole(total, below)


@jit
def part(total, below, w, s, x, low, a_scales, a_sums, w_ahead, s_ahead):
    """The next 512 columns of a row: both of its running sums. ahead: bytes to what will be wanted next."""
    scale = load_f16(s)
    prefetch(s + s_ahead)
    below = fma(scale, load_f32(a_sums), below)
    return dot_chunk(total, w, x, low, scale * load_f32(a_scales), w + w_ahead), below


@jit
def last_part(total, below, w, s, x, low, a_scales, a_sums, w_ahead, s_ahead):
    """As `part`, for 64 columns."""
    scale = load_f16_pair(s)
    prefetch(w + w_ahead)
    prefetch(s + s_ahead)
    below = fma(scale, load_f32_pair(a_sums), below)
    return dot_block(total, w, x, low, scale * load_f32_pair(a_scales)), below


@jit
def dot_four(matrix, r0, r1, r2, r3, n0, n1, n2, n3, x, quantized, out):
    """See FormatKernels."""
    columns, groups = matrix[COLUMNS], matrix[COLUMNS] // 16  # bytes of a row and of its scales
    w0, w1 = matrix[DATA] + r0 * columns, matrix[DATA] + r1 * columns
    w2, w3 = matrix[DATA] + r2 * columns, matrix[DATA] + r3 * columns
    s0, s1 = matrix[SCALE] + r0 * groups, matrix[SCALE] + r1 * groups
    s2, s3 = matrix[SCALE] + r2 * groups, matrix[SCALE] + r3 * groups
    d0, d1, d2, d3 = (n0 - r0) * columns, (n1 - r1) * columns, (n2 - r2) * columns, (n3 - r3) * columns
    e0, e1, e2, e3 = (n0 - r0) * groups, (n1 - r1) * groups, (n2 - r2) * groups, (n3 - r3) * groups
    low, scales = quantized + columns, quantized + 2 * columns
    sums = scales + columns // 8
    t0, t1, t2, t3 = zero_f32(), zero_f32(), zero_f32(), zero_f32()
    b0, b1, b2, b3 = zero_f32(), zero_f32(), zero_f32(), zero_f32()
    chunks = columns // 512 * 512
    for c in range(0, chunks, 512):
        p, q, a, b, g = quantized + c, low + c, scales + c // 8, sums + c // 8, c // 16
        t0, b0 = part(t0, b0, w0 + c, s0 + g, p, q, a, b, d0, e0)
        t1, b1 = part(t1, b1, w1 + c, s1 + g, p, q, a, b, d1, e1)
        t2, b2 = part(t2, b2, w2 + c, s2 + g, p, q, a, b, d2, e2)
        t3, b3 = part(t3, b3, w3 + c, s3 + g, p, q, a, b, d3, e3)
    for c in range(chunks, columns, 64):
        p, q, a, b, g = quantized + c, low + c, scales + c // 8, sums + c // 8, c // 16
        t0, b0 = last_part(t0, b0, w0 + c, s0 + g, p, q, a, b, d0, e0)
        t1, b1 = last_part(t1, b1, w1 + c, s1 + g, p, q, a, b, d1, e1)
        t2, b2 = last_part(t2, b2, w2 + c, s2 + g, p, q, a, b, d2, e2)
        t3, b3 = last_part(t3, b3, w3 + c, s3 + g, p, q, a, b, d3, e3)
    store_real(out, whole(t0, b0))
    store_real(out + 4, whole(t1, b1))
    store_real(out + 8, whole(t2, b2))
    store_real(out + 12, whole(t3, b3))


@jit
def load_weights(matrix, row, column):
    """See FormatKernels."""
    at = row * matrix[COLUMNS] + column
    return load_sixteen(matrix[DATA] + at) * splat_f32(load_half(matrix[SCALE] + at // 32 * 2))


@jit
def pack_panel(matrix, first, start, stop, panel, staging):
    """See FormatKernels."""
    columns, rows = matrix[COLUMNS], matrix[ROWS]
    for lane in range(PANEL):
        row = first + lane
        present = row < rows
        groups = min(row, rows - 1) * (columns // 32)
        for group in range(start // 32, stop // 32):
            scale = _ZERO
            if present:
                scale = load_half(matrix[SCALE] + 2 * (groups + group))
            store_real(panel + 640 * (group - start // 32) + 4 * lane, scale)
            store_real(panel + 640 * (group - start // 32) + 64 + 4 * lane, -_BIAS * scale)
    for column in range(start, stop, 64):
        for lane in range(PANEL):
            row = min(first + lane, rows - 1)
            copy_biased(staging + 64 * lane, matrix[DATA] + row * columns + column)
        pack_words(staging, 64, staging + 1024)
        for step in range(16):
            to = panel + 640 * ((column - start) // 32 + step // 8) + 128 + 64 * (step % 8)
            store_f32(to, load_f32(staging + 1024 + 64 * step))


def scaling(load_scales: Any) -> Any:
    """Planes of four rows' weights for as many groups as `load_scales` loads."""

    @jit
    def scale(s0, s1, s2, s3, h0, h1, h2, h3, to, stride, side):
        p0, p1 = load_scales(s0) * splat_f32(h0), load_scales(s1) * splat_f32(h1)
        p2, p3 = load_scales(s2) * splat_f32(h2), load_scales(s3) * splat_f32(h3)
        add_whole(side, pack_planes(p0, p1, p2, p3, to, to + stride))

    return scale


scale_sixteen, scale_two = scaling(load_f16), scaling(load_f16_pair)


@jit
def scale_four(matrix, rows, weights, planes, stride, side, first, last):
    """See RowSums."""
    size, scale = matrix[COLUMNS] // 16, matrix[SCALE] + 2 * first
    s0, s1 = scale + load_int(rows) * size, scale + load_int(rows + 4) * size
    s2, s3 = scale + load_int(rows + 8) * size, scale + load_int(rows + 12) * size
    h0, h1, h2, h3 = load_real(weights), load_real(weights + 4), load_real(weights + 8), load_real(weights + 12)
    whole = (last - first) // 16 * 16
    for g in range(0, 2 * whole, 32):
        to, below = planes + 2 * g, side + 2 * g
        scale_sixteen(s0 + g, s1 + g, s2 + g, s3 + g, h0, h1, h2, h3, to, stride, below)
    for g in range(2 * whole, 2 * (last - first), 4):
        to, below = planes + 2 * g, side + 2 * g
        scale_two(s0 + g, s1 + g, s2 + g, s3 + g, h0, h1, h2, h3, to, stride, below)


def _emit_block(builder, at):
    return emit_bias(builder, load(builder, at, I8V))


Q8_KERNELS = FormatKernels(
    "q8", dot_row, dot_four, load_weights, pack_panel, columns_by(load_weights),
    sums=RowSums(scale_four, adding(64, _emit_block), finishing(affine=False)),
)  # fmt: skip
