"""What q8 and q6 share: integer weights with a float16 scale a group, multiplied with 16-bit activations.

A format brings two emitters and the offset that its unpacked values have: stored values are unsigned where the integer
product wants them so, and sum(w * a) = sum((w + offset) * a) - offset * sum(a), whose last sum is made once for all
rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import types

from svdengine.kernels.cpu.dot import BLOCK, CHUNK, emit_dot_16, emit_scaled, load_f16_pair, load_f32_pair
from svdengine.kernels.cpu.formats.kernels import PANEL, FormatKernels, columns_by
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.matrix import COLUMNS, DATA, ROWS, SCALE
from svdengine.kernels.cpu.simd import (
    F32V,
    I64,
    address,
    emit_prefetch,
    f32x16,
    fma,
    fused,
    half_to_float,
    index,
    load,
    load_f16,
    load_f32,
    load_half,
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
from svdengine.kernels.formats import WeightFormat


class Unpacking(NamedTuple):
    """How a format's values are read from a block of 64 columns."""

    block_bytes: int
    offset: int  # of the values that `emit_block` gives above the weights
    emit_block: Any  # (builder, at) -> 64 bytes as `emit_dot` wants them, in the order of the columns
    emit_sixteen: Any  # (builder, at, v) -> 16 int8 weights from column 16 v of the block; v: an int64 value


class _Operations(NamedTuple):
    dot_chunk: Any
    dot_block: Any
    add_rows: Any
    load_sixteen: Any
    store_block: Any


def _operations(unpacking: Unpacking) -> _Operations:
    size, _, emit_block, emit_sixteen = unpacking

    def emit_sixteen_floats(builder, at, v):
        return builder.sitofp(emit_sixteen(builder, at, v), F32V)

    @operation(f32x16, f32x16, address, address, address, f32x16, address)
    def dot_chunk(builder, total, weights, high, low, scales, ahead):
        """total + scaled products of 512 columns of weights, less the offset's term. scales: of both sides, by group.

        ahead: address of as many bytes that will be wanted next; the hardware alone does not fetch far enough ahead.
        """
        for block in range(CHUNK // BLOCK):
            offset, at = ir.Constant(I64, block * BLOCK), ir.Constant(I64, block * size)
            emit_prefetch(builder, builder.add(ahead, at))
            w = emit_block(builder, builder.add(weights, at))
            dots = emit_dot_16(builder, w, builder.add(high, offset), builder.add(low, offset))
            total = emit_scaled(builder, total, dots, scales, block)
        return total

    @operation(f32x16, f32x16, address, address, address, f32x16)
    def dot_block(builder, total, weights, high, low, scales):
        """As `dot_chunk`, for 64 columns; the scales are those of the first two lanes."""
        return emit_scaled(builder, total, emit_dot_16(builder, emit_block(builder, weights), high, low), scales, 0)

    @operation(
        types.void, address, address, address, address, address, address, address, address, address,
        real, real, real, real, index,
    )  # fmt: skip
    def add_rows(builder, out, w0, w1, w2, w3, s0, s1, s2, s3, h0, h1, h2, h3, blocks):
        """The sum of four weighted rows; w, s: addresses of the rows and of their scales."""

        def body(i, _):
            to = builder.add(out, builder.mul(i, ir.Constant(I64, 256)))
            columns, groups = builder.mul(i, ir.Constant(I64, size)), builder.mul(i, ir.Constant(I64, 4))
            totals = [load(builder, to, F32V, 64 * v) for v in range(4)]
            for w, s, h in zip((w0, w1, w2, w3), (s0, s1, s2, s3), (h0, h1, h2, h3), strict=True):
                at, scales = builder.add(w, columns), builder.add(s, groups)
                for group in range(2):
                    scale = half_to_float(builder, load(builder, scales, ir.HalfType(), 2 * group))
                    weight = splat(builder, builder.fmul(scale, h))
                    for v in (2 * group, 2 * group + 1):
                        values = emit_sixteen_floats(builder, at, ir.Constant(I64, v))
                        totals[v] = fused(builder, values, weight, totals[v])
            for v in range(4):
                store(builder, builder.add(to, ir.Constant(I64, 64 * v)), totals[v])
            return []

        loop(builder, blocks, [], body)

    @operation(f32x16, address, index)
    def load_sixteen(builder, at, v):
        """16 weights from column 16 v of a block, converted but not scaled."""
        return emit_sixteen_floats(builder, at, v)

    @operation(types.void, address, address)
    def store_block(builder, to, at):
        """64 bytes as `emit_dot` wants them."""
        store(builder, to, emit_block(builder, at))

    return _Operations(dot_chunk, dot_block, add_rows, load_sixteen, store_block)


def _dots(size: int, offset: int, dot_chunk: Any, dot_block: Any) -> tuple[Any, Any]:
    """`dot_row` and `dot_four`."""
    _offset = np.float32(offset)

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
    def whole(total, below):
        """A row's product from its running sums."""
        if offset:
            return sum_lanes(total) - _offset * sum_lanes(below)
        return sum_lanes(total)

    @jit
    def dot_row(matrix, row, x, quantized, ahead):
        columns = matrix[COLUMNS]
        weights, scales = matrix[DATA] + row * (columns // 64 * size), matrix[SCALE] + row * (columns // 16)
        high, low = quantized, quantized + columns
        a_scales = low + columns
        a_sums = a_scales + columns // 8
        total = zero_f32()
        below = zero_f32()
        for _ in range(columns // 512):
            s = load_f16(scales)
            below = fma(s, load_f32(a_sums), below)
            total = dot_chunk(total, weights, high, low, s * load_f32(a_scales), weights + ahead)
            weights += 8 * size
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
            weights += size
            high += 64
            low += 64
            scales += 4
            a_scales += 8
            a_sums += 8
        return whole(total, below)

    @jit
    def dot_four(matrix, r0, r1, r2, r3, n0, n1, n2, n3, x, quantized, out):
        columns = matrix[COLUMNS]
        stride, groups = columns // 64 * size, columns // 16  # bytes of a row and of its scales
        w0, w1 = matrix[DATA] + r0 * stride, matrix[DATA] + r1 * stride
        w2, w3 = matrix[DATA] + r2 * stride, matrix[DATA] + r3 * stride
        s0, s1 = matrix[SCALE] + r0 * groups, matrix[SCALE] + r1 * groups
        s2, s3 = matrix[SCALE] + r2 * groups, matrix[SCALE] + r3 * groups
        d0, d1, d2, d3 = (n0 - r0) * stride, (n1 - r1) * stride, (n2 - r2) * stride, (n3 - r3) * stride
        e0, e1, e2, e3 = (n0 - r0) * groups, (n1 - r1) * groups, (n2 - r2) * groups, (n3 - r3) * groups
        low, scales = quantized + columns, quantized + 2 * columns
        sums = scales + columns // 8
        t0, t1, t2, t3 = zero_f32(), zero_f32(), zero_f32(), zero_f32()
        b0, b1, b2, b3 = zero_f32(), zero_f32(), zero_f32(), zero_f32()
        chunks = columns // 512 * 512
        for c in range(0, chunks, 512):
            p, q, a, b, g, d = quantized + c, low + c, scales + c // 8, sums + c // 8, c // 16, c // 64 * size
            t0, b0 = part(t0, b0, w0 + d, s0 + g, p, q, a, b, d0, e0)
            t1, b1 = part(t1, b1, w1 + d, s1 + g, p, q, a, b, d1, e1)
            t2, b2 = part(t2, b2, w2 + d, s2 + g, p, q, a, b, d2, e2)
            t3, b3 = part(t3, b3, w3 + d, s3 + g, p, q, a, b, d3, e3)
        for c in range(chunks, columns, 64):
            p, q, a, b, g, d = quantized + c, low + c, scales + c // 8, sums + c // 8, c // 16, c // 64 * size
            t0, b0 = last_part(t0, b0, w0 + d, s0 + g, p, q, a, b, d0, e0)
            t1, b1 = last_part(t1, b1, w1 + d, s1 + g, p, q, a, b, d1, e1)
            t2, b2 = last_part(t2, b2, w2 + d, s2 + g, p, q, a, b, d2, e2)
            t3, b3 = last_part(t3, b3, w3 + d, s3 + g, p, q, a, b, d3, e3)
        store_real(out, whole(t0, b0))
        store_real(out + 4, whole(t1, b1))
        store_real(out + 8, whole(t2, b2))
        store_real(out + 12, whole(t3, b3))

    return dot_row, dot_four


def scaled_kernels(name: WeightFormat, unpacking: Unpacking) -> FormatKernels:
    """The kernels of a format that stores its values as `unpacking` reads them."""
    size, offset = unpacking.block_bytes, unpacking.offset
    dot_chunk, dot_block, add_rows, load_sixteen, store_block = _operations(unpacking)
    dot_row, dot_four = _dots(size, offset, dot_chunk, dot_block)
    _offset, nothing = np.float32(offset), np.float32(0)

    @jit
    def add_four(matrix, r0, r1, r2, r3, h0, h1, h2, h3, out, first, last):
        stride, groups = matrix[COLUMNS] // 64 * size, matrix[COLUMNS] // 16
        data, scale = matrix[DATA] + first // 64 * size, matrix[SCALE] + first // 16
        add_rows(
            out + 4 * first, data + r0 * stride, data + r1 * stride, data + r2 * stride, data + r3 * stride,
            scale + r0 * groups, scale + r1 * groups, scale + r2 * groups, scale + r3 * groups,
            h0, h1, h2, h3, (last - first) // 64,
        )  # fmt: skip

    @jit
    def load_weights(matrix, row, column):
        at = row * matrix[COLUMNS] + column
        weights = load_sixteen(matrix[DATA] + at // 64 * size, column % 64 // 16)
        return weights * splat_f32(load_half(matrix[SCALE] + at // 32 * 2))

    @jit
    def pack_panel(matrix, first, start, stop, panel, staging):
        columns, rows = matrix[COLUMNS], matrix[ROWS]
        for lane in range(PANEL):
            row = first + lane
            present = row < rows
            groups = min(row, rows - 1) * (columns // 32)
            for group in range(start // 32, stop // 32):
                scale = nothing
                if present:
                    scale = load_half(matrix[SCALE] + 2 * (groups + group))
                store_real(panel + 640 * (group - start // 32) + 4 * lane, scale)
                store_real(panel + 640 * (group - start // 32) + 64 + 4 * lane, -_offset * scale)
        for column in range(start, stop, 64):
            for lane in range(PANEL):
                row = min(first + lane, rows - 1)
                store_block(staging + 64 * lane, matrix[DATA] + (row * columns + column) // 64 * size)
            transpose_words(staging, 64, staging + 1024)
            for step in range(16):
                to = panel + 640 * ((column - start) // 32 + step // 8) + 128 + 64 * (step % 8)
                store_f32(to, load_f32(staging + 1024 + 64 * step))

    return FormatKernels(name, dot_row, dot_four, add_four, load_weights, pack_panel, columns_by(load_weights))
