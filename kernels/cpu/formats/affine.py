"""What q4 and q6 share: unsigned levels with a scale and a minimum a group, w = row[0] * scale * q - row[1] * min.

The minimum's part of a product is row[1] * sum over groups of min * (sum of the group's activations), whose last sums
are made once for all rows (quantize.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import types

from svdengine.kernels.cpu.dot import (
    BLOCK,
    CHUNK,
    emit_dot_16,
    emit_scaled,
    load_f32_pair,
    load_u8_pair,
)
from svdengine.kernels.cpu.formats.kernels import PANEL, FormatKernels, columns_by
from svdengine.kernels.cpu.formats.sums import RowSums, adding, finishing, pack_planes
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.matrix import COLUMNS, DATA, MIN, ROW, ROWS, SCALE
from svdengine.kernels.cpu.simd import (
    F32V,
    I64,
    address,
    emit_prefetch,
    f32x16,
    fma,
    index,
    load_f32,
    load_int,
    load_real,
    load_u8_as_f32,
    load_u8_as_real,
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
from svdengine.kernels.formats import WeightFormat


class Unpacking(NamedTuple):
    """How a format's levels are read from a block of 64 columns."""

    block_bytes: int
    emit_block: Any  # (builder, at) -> 64 bytes, in the order of the columns
    emit_sixteen: Any  # (builder, at, v) -> 16 bytes, levels from column 16 v of the block; v: an int64 value


class _Operations(NamedTuple):
    dot_chunk: Any
    dot_block: Any
    load_sixteen: Any
    store_block: Any


def _operations(unpacking: Unpacking) -> _Operations:
    size, emit_block, emit_sixteen = unpacking

    def emit_dots(builder, weights, high, low):
        return emit_dot_16(builder, emit_block(builder, weights), high, low)

    @operation(f32x16, f32x16, address, address, address, f32x16, address)
    def dot_chunk(builder, total, weights, high, low, scales, ahead):
        """total + scaled products of 512 columns, less the minima's part. scales: of both sides, by group.

        ahead: address of as many bytes that will be wanted next; the hardware alone does not fetch far enough ahead.
        """
        lines = {64 * i for i in range(-(-size * (CHUNK // BLOCK) // 64))}
        for block in range(CHUNK // BLOCK):
            at, columns = ir.Constant(I64, block * size), ir.Constant(I64, block * BLOCK)
            due = {line for line in lines if line < (block + 1) * size}
            for line in sorted(due):
                emit_prefetch(builder, builder.add(ahead, ir.Constant(I64, line)))
            lines -= due
            x = builder.add(high, columns), builder.add(low, columns)
            dots = emit_dots(builder, builder.add(weights, at), *x)
            total = emit_scaled(builder, total, dots, scales, block)
        return total

    @operation(f32x16, f32x16, address, address, address, f32x16)
    def dot_block(builder, total, weights, high, low, scales):
        """As `dot_chunk`, for 64 columns; the scales are those of the first two lanes."""
        return emit_scaled(builder, total, emit_dots(builder, weights, high, low), scales, 0)

    @operation(f32x16, address, index)
    def load_sixteen(builder, at, v):
        """16 levels from column 16 v of a block, converted."""
        return builder.uitofp(emit_sixteen(builder, at, v), F32V)

    @operation(types.void, address, address)
    def store_block(builder, to, at):
        """A block's levels to 64 bytes."""
        store(builder, to, emit_block(builder, at))

    return _Operations(dot_chunk, dot_block, load_sixteen, store_block)


def _dots(size: int, dot_chunk: Any, dot_block: Any) -> tuple[Any, Any]:
    """`dot_row` and `dot_four`."""

    @jit
    def whole(total, low, row):
        """A row's product from its running sums; row: address of the row's two units."""
        return load_real(row) * sum_lanes(total) - load_real(row + 4) * sum_lanes(low)

    @jit
    def dot_row(matrix, row, x, quantized, ahead):
        columns = matrix[COLUMNS]
        groups = columns // 32
        weights, scales = matrix[DATA] + row * (columns // 64 * size), matrix[SCALE] + row * groups
        minima = matrix[MIN] + row * groups
        high, plane = quantized, quantized + columns
        a_scales = quantized + 2 * columns
        a_sums = a_scales + columns // 8
        total = zero_f32()
        low = zero_f32()
        for _ in range(columns // 512):
            low = fma(load_u8_as_f32(minima), load_f32(a_sums), low)
            both = load_u8_as_f32(scales) * load_f32(a_scales)
            total = dot_chunk(total, weights, high, plane, both, weights + ahead)
            weights += 8 * size
            high += 512
            plane += 512
            scales += 16
            minima += 16
            a_scales += 64
            a_sums += 64
        for _ in range((columns % 512) // 64):
            low = fma(load_u8_pair(minima), load_f32_pair(a_sums), low)
            prefetch(weights + ahead)
            total = dot_block(total, weights, high, plane, load_u8_pair(scales) * load_f32_pair(a_scales))
            weights += size
            high += 64
            plane += 64
            scales += 2
            minima += 2
            a_scales += 8
            a_sums += 8
        return whole(total, low, matrix[ROW] + 8 * row)

    @jit
    def part(total, low, w, s, m, x, plane, a_scales, a_sums, w_ahead, s_ahead):
        """The next 512 columns of a row: both of its running sums. ahead: bytes to what will be wanted next."""
        prefetch(s + s_ahead)
        prefetch(m + s_ahead)
        low = fma(load_u8_as_f32(m), load_f32(a_sums), low)
        return dot_chunk(total, w, x, plane, load_u8_as_f32(s) * load_f32(a_scales), w + w_ahead), low

    @jit
    def last_part(total, low, w, s, m, x, plane, a_scales, a_sums, w_ahead, s_ahead):
        """As `part`, for 64 columns."""
        prefetch(w + w_ahead)
        prefetch(s + s_ahead)
        prefetch(m + s_ahead)
        low = fma(load_u8_pair(m), load_f32_pair(a_sums), low)
        return dot_block(total, w, x, plane, load_u8_pair(s) * load_f32_pair(a_scales)), low

    @jit
    def dot_four(matrix, r0, r1, r2, r3, n0, n1, n2, n3, x, quantized, out):
        columns = matrix[COLUMNS]
        stride, groups = columns // 64 * size, columns // 32  # bytes of a row and of its scales
        minima = matrix[MIN] - matrix[SCALE]
        w0, w1 = matrix[DATA] + r0 * stride, matrix[DATA] + r1 * stride
        w2, w3 = matrix[DATA] + r2 * stride, matrix[DATA] + r3 * stride
        s0, s1 = matrix[SCALE] + r0 * groups, matrix[SCALE] + r1 * groups
        s2, s3 = matrix[SCALE] + r2 * groups, matrix[SCALE] + r3 * groups
        d0, d1, d2, d3 = (n0 - r0) * stride, (n1 - r1) * stride, (n2 - r2) * stride, (n3 - r3) * stride
        e0, e1, e2, e3 = (n0 - r0) * groups, (n1 - r1) * groups, (n2 - r2) * groups, (n3 - r3) * groups
        plane, scales = quantized + columns, quantized + 2 * columns
        sums = scales + columns // 8
        t0, t1, t2, t3 = zero_f32(), zero_f32(), zero_f32(), zero_f32()
        b0, b1, b2, b3 = zero_f32(), zero_f32(), zero_f32(), zero_f32()
        chunks = columns // 512 * 512
        for c in range(0, chunks, 512):
            p, q, a, b, h, g = quantized + c, plane + c, scales + c // 8, sums + c // 8, c // 64 * size, c // 32
            t0, b0 = part(t0, b0, w0 + h, s0 + g, s0 + g + minima, p, q, a, b, d0, e0)
            t1, b1 = part(t1, b1, w1 + h, s1 + g, s1 + g + minima, p, q, a, b, d1, e1)
            t2, b2 = part(t2, b2, w2 + h, s2 + g, s2 + g + minima, p, q, a, b, d2, e2)
            t3, b3 = part(t3, b3, w3 + h, s3 + g, s3 + g + minima, p, q, a, b, d3, e3)
        for c in range(chunks, columns, 64):
            p, q, a, b, h, g = quantized + c, plane + c, scales + c // 8, sums + c // 8, c // 64 * size, c // 32
            t0, b0 = last_part(t0, b0, w0 + h, s0 + g, s0 + g + minima, p, q, a, b, d0, e0)
            t1, b1 = last_part(t1, b1, w1 + h, s1 + g, s1 + g + minima, p, q, a, b, d1, e1)
            t2, b2 = last_part(t2, b2, w2 + h, s2 + g, s2 + g + minima, p, q, a, b, d2, e2)
            t3, b3 = last_part(t3, b3, w3 + h, s3 + g, s3 + g + minima, p, q, a, b, d3, e3)
        row = matrix[ROW]
        store_real(out, whole(t0, b0, row + 8 * r0))
        store_real(out + 4, whole(t1, b1, row + 8 * r1))
        store_real(out + 8, whole(t2, b2, row + 8 * r2))
        store_real(out + 12, whole(t3, b3, row + 8 * r3))

    return dot_row, dot_four


def _scaling(load_levels: Any) -> Any:
    """Planes of four rows' weights for as many groups as `load_levels` loads, and the sums of their weighted minima."""

    @jit
    def scale(s0, s1, s2, s3, minima, h0, h1, h2, h3, m0, m1, m2, m3, to, stride, side):
        p0, p1 = load_levels(s0) * splat_f32(h0), load_levels(s1) * splat_f32(h1)
        p2, p3 = load_levels(s2) * splat_f32(h2), load_levels(s3) * splat_f32(h3)
        pack_planes(p0, p1, p2, p3, to, to + stride)
        low = fma(load_levels(s0 + minima), splat_f32(m0), load_f32(side))
        low = fma(load_levels(s1 + minima), splat_f32(m1), low)
        low = fma(load_levels(s2 + minima), splat_f32(m2), low)
        store_f32(side, fma(load_levels(s3 + minima), splat_f32(m3), low))

    return scale


scale_sixteen, scale_two = _scaling(load_u8_as_f32), _scaling(load_u8_pair)


@jit
def scale_four(matrix, rows, weights, planes, stride, side, first, last):
    """See RowSums. The minima are added up as they are, weighted."""
    size, scale, minima, unit = matrix[COLUMNS] // 32, matrix[SCALE] + first, matrix[MIN] - matrix[SCALE], matrix[ROW]
    i0, i1, i2, i3 = load_int(rows), load_int(rows + 4), load_int(rows + 8), load_int(rows + 12)
    s0, s1, s2, s3 = scale + i0 * size, scale + i1 * size, scale + i2 * size, scale + i3 * size
    u0, u1, u2, u3 = unit + 8 * i0, unit + 8 * i1, unit + 8 * i2, unit + 8 * i3
    h0, h1, h2, h3 = load_real(weights), load_real(weights + 4), load_real(weights + 8), load_real(weights + 12)
    m0, m1, m2, m3 = h0 * load_real(u0 + 4), h1 * load_real(u1 + 4), h2 * load_real(u2 + 4), h3 * load_real(u3 + 4)
    h0, h1, h2, h3 = h0 * load_real(u0), h1 * load_real(u1), h2 * load_real(u2), h3 * load_real(u3)
    whole = (last - first) // 16 * 16
    for g in range(0, whole, 16):
        to, low = planes + 4 * g, side + 4 * g
        scale_sixteen(s0 + g, s1 + g, s2 + g, s3 + g, minima, h0, h1, h2, h3, m0, m1, m2, m3, to, stride, low)
    for g in range(whole, last - first, 2):
        to, low = planes + 4 * g, side + 4 * g
        scale_two(s0 + g, s1 + g, s2 + g, s3 + g, minima, h0, h1, h2, h3, m0, m1, m2, m3, to, stride, low)


def affine_kernels(name: WeightFormat, unpacking: Unpacking) -> FormatKernels:
    """The kernels of a format that stores its levels as `unpacking` reads them."""
    size = unpacking.block_bytes
    dot_chunk, dot_block, load_sixteen, store_block = _operations(unpacking)
    dot_row, dot_four = _dots(size, dot_chunk, dot_block)
    nothing = np.float32(0)

    @jit
    def load_weights(matrix, row, column):
        at, unit = row * matrix[COLUMNS] + column, matrix[ROW] + 8 * row
        q = load_sixteen(matrix[DATA] + at // 64 * size, column % 64 // 16)
        scale = load_real(unit) * load_u8_as_real(matrix[SCALE] + at // 32)
        low = load_real(unit + 4) * load_u8_as_real(matrix[MIN] + at // 32)
        return q * splat_f32(scale) - splat_f32(low)

    @jit
    def pack_panel(matrix, first, start, stop, panel, staging):
        columns, rows = matrix[COLUMNS], matrix[ROWS]
        for lane in range(PANEL):
            row = first + lane
            present = row < rows
            row = min(row, rows - 1)
            groups, unit = row * (columns // 32), matrix[ROW] + 8 * row
            for group in range(start // 32, stop // 32):
                scale = nothing
                low = nothing
                if present:
                    scale = load_real(unit) * load_u8_as_real(matrix[SCALE] + groups + group)
                    low = -load_real(unit + 4) * load_u8_as_real(matrix[MIN] + groups + group)
                store_real(panel + 640 * (group - start // 32) + 4 * lane, scale)
                store_real(panel + 640 * (group - start // 32) + 64 + 4 * lane, low)
        for column in range(start, stop, 64):
            for lane in range(PANEL):
                row = min(first + lane, rows - 1)
                store_block(staging + 64 * lane, matrix[DATA] + (row * columns + column) // 64 * size)
            pack_words(staging, 64, staging + 1024)
            for step in range(16):
                to = panel + 640 * ((column - start) // 32 + step // 8) + 128 + 64 * (step % 8)
                store_f32(to, load_f32(staging + 1024 + 64 * step))

    sums = RowSums(scale_four, adding(size, unpacking.emit_block), finishing(affine=True))
    return FormatKernels(name, dot_row, dot_four, load_weights, pack_panel, columns_by(load_weights), sums=sums)
