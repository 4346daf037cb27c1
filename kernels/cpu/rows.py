"""Sums of weighted rows: out += h0 * row0 + ... + h3 * row3, for neuron-major matrices in every weight format.

Rows are added one after the other, so a row whose weight is 0 changes nothing, not even the rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types

from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.model import BF16, COLUMNS, DATA, F16, F32, FORMAT, MIN, Q4, Q8, ROW, SCALE
from svdengine.kernels.cpu.model import ROWS as MATRIX_ROWS
from svdengine.kernels.cpu.simd import (
    F32V,
    I8,
    I16,
    I32V,
    I64,
    address,
    fused,
    half_to_float,
    index,
    load,
    load_real,
    operation,
    prefetch,
    real,
    splat,
    store,
)
from svdengine.kernels.cpu.tile import loop

ROWS = 4  # added in one pass over the columns
TOGETHER = 32  # rows that wait in the second-level cache for all rows of a batch


def _unsigned(builder, bytes_):
    return builder.uitofp(bytes_, F32V)


def _float_weights(kind: int, builder, at):
    """Four vectors: the 64 weights of a block of a float row."""
    size = {F32: 4, F16: 2, BF16: 2}[kind]
    vectors = []
    for v in range(4):
        if kind == F32:
            vectors.append(load(builder, at, F32V, 64 * v))
        elif kind == F16:
            vectors.append(half_to_float(builder, load(builder, at, ir.VectorType(ir.HalfType(), 16), 16 * size * v)))
        else:
            wide = builder.zext(load(builder, at, ir.VectorType(I16, 16), 32 * v), I32V)
            vectors.append(builder.bitcast(builder.shl(wide, ir.Constant(I32V, [16] * 16)), F32V))
    return vectors


def float_rows(kind: int) -> Any:
    """The sum for rows of f32, f16 or bf16."""
    block_bytes = {F32: 256, F16: 128, BF16: 128}[kind]

    @operation(types.void, address, address, address, address, address, real, real, real, real, index)
    def add(builder, out, w0, w1, w2, w3, h0, h1, h2, h3, blocks):
        """w: addresses of the rows; blocks: of 64 columns."""
        weights = [splat(builder, h) for h in (h0, h1, h2, h3)]

        def body(i, _):
            to = builder.add(out, builder.mul(i, ir.Constant(I64, 256)))
            offset = builder.mul(i, ir.Constant(I64, block_bytes))
            totals = [load(builder, to, F32V, 64 * v) for v in range(4)]
            for w, h in zip((w0, w1, w2, w3), weights, strict=True):
                values = _float_weights(kind, builder, builder.add(w, offset))
                totals = [fused(builder, value, h, total) for value, total in zip(values, totals, strict=True)]
            for v in range(4):
                store(builder, builder.add(to, ir.Constant(I64, 64 * v)), totals[v])
            return []

        loop(builder, blocks, [], body)

    return add


@operation(
    types.void, address, address, address, address, address, address, address, address, address, real, real, real, real,
    index,
)  # fmt: skip
def add_q8(builder, out, w0, w1, w2, w3, s0, s1, s2, s3, h0, h1, h2, h3, blocks):
    """The sum for q8 rows; s: addresses of the rows' scales."""

    def body(i, _):
        to = builder.add(out, builder.mul(i, ir.Constant(I64, 256)))
        columns, groups = builder.mul(i, ir.Constant(I64, 64)), builder.mul(i, ir.Constant(I64, 4))
        totals = [load(builder, to, F32V, 64 * v) for v in range(4)]
        for w, s, h in zip((w0, w1, w2, w3), (s0, s1, s2, s3), (h0, h1, h2, h3), strict=True):
            at, scales = builder.add(w, columns), builder.add(s, groups)
            for group in range(2):
                scale = half_to_float(builder, load(builder, scales, ir.HalfType(), 2 * group))
                weight = splat(builder, builder.fmul(scale, h))
                for v in (2 * group, 2 * group + 1):
                    values = builder.sitofp(load(builder, at, ir.VectorType(I8, 16), 16 * v), F32V)
                    totals[v] = fused(builder, values, weight, totals[v])
        for v in range(4):
            store(builder, builder.add(to, ir.Constant(I64, 64 * v)), totals[v])
        return []

    loop(builder, blocks, [], body)


@operation(
    types.void, address, address, address, address, address, address, address, address, address, index,
    real, real, real, real, real, real, real, real, index,
)  # fmt: skip
def add_q4(builder, out, w0, w1, w2, w3, s0, s1, s2, s3, minima, h0, h1, h2, h3, m0, m1, m2, m3, blocks):
    """The sum for q4 rows; h: weights times the rows' units of scale, m: times those of the minima.

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
                    total = fused(builder, _unsigned(builder, packed), weight, totals[target])
                    totals[target] = builder.fsub(total, lowest)
        for v in range(4):
            store(builder, builder.add(to, ir.Constant(I64, 64 * v)), totals[v])
        return []

    loop(builder, blocks, [], body)


add_f32, add_f16, add_bf16 = float_rows(F32), float_rows(F16), float_rows(BF16)


@jit
def add_range(matrix, weights, first, last, out):
    """out += weights[i] times row i, for rows first..last. weights: address of floats."""
    columns = matrix[COLUMNS]
    whole = first + (last - first) // ROWS * ROWS
    for i in range(first, whole, ROWS):
        at = weights + 4 * i
        add_four(
            matrix, i, i + 1, i + 2, i + 3,
            load_real(at), load_real(at + 4), load_real(at + 8), load_real(at + 12), out, 0, columns,
        )  # fmt: skip
    for i in range(whole, last):
        zero = np.float32(0)
        add_four(matrix, i, i, i, i, load_real(weights + 4 * i), zero, zero, zero, out, 0, columns)


@jit
def add_to_few(matrix, weights, weights_stride, n, out, out_stride, first, last):
    """out[t, first..last] += weights[t, i] times row i, over all rows i, for n rows t; columns in multiples of 64.

    Some rows at a time, so that they come from memory once and from the second-level cache for every further t.
    """
    rows = matrix[MATRIX_ROWS]
    zero = np.float32(0)
    for start in range(0, rows, TOGETHER):
        stop = min(rows, start + TOGETHER)
        whole = start + (stop - start) // ROWS * ROWS
        for t in range(n):
            at, to = weights + t * weights_stride, out + t * out_stride
            for i in range(start, whole, ROWS):
                if t == 0:
                    for ahead in range(i + TOGETHER, min(rows, i + TOGETHER + ROWS)):
                        fetch_part(matrix, ahead, first, last)
                h = at + 4 * i
                add_four(
                    matrix, i, i + 1, i + 2, i + 3,
                    load_real(h), load_real(h + 4), load_real(h + 8), load_real(h + 12), to, first, last,
                )  # fmt: skip
            for i in range(whole, stop):
                add_four(matrix, i, i, i, i, load_real(at + 4 * i), zero, zero, zero, to, first, last)


@jit
def row_bytes(matrix):
    """Bytes of one row's values."""
    columns, kind = matrix[COLUMNS], matrix[FORMAT]
    if kind == Q8:
        return columns
    if kind == Q4:
        return columns // 2
    return 4 * columns if kind == F32 else 2 * columns


@jit
def fetch_part(matrix, row, first, last):
    """Ask for the cache lines of columns first..last of a row."""
    size = row_bytes(matrix)
    at = matrix[DATA] + row * size
    for line in range(first * size // matrix[COLUMNS], last * size // matrix[COLUMNS], 64):
        prefetch(at + line)


@jit
def add_four(matrix, r0, r1, r2, r3, h0, h1, h2, h3, out, first, last):
    """out[first..last] += h0 * row r0 + ... + h3 * row r3 of a matrix, in these columns, multiples of 64."""
    columns, kind = matrix[COLUMNS], matrix[FORMAT]
    blocks = (last - first) // 64
    out += 4 * first
    if kind == Q8:
        data, scale, groups = matrix[DATA] + first, matrix[SCALE] + first // 16, columns // 16
        add_q8(
            out, data + r0 * columns, data + r1 * columns, data + r2 * columns, data + r3 * columns,
            scale + r0 * groups, scale + r1 * groups, scale + r2 * groups, scale + r3 * groups,
            h0, h1, h2, h3, blocks,
        )  # fmt: skip
    elif kind == Q4:
        data, scale, groups, half = matrix[DATA] + first // 2, matrix[SCALE] + first // 32, columns // 32, columns // 2
        unit = matrix[ROW]
        u0, u1, u2, u3 = unit + 8 * r0, unit + 8 * r1, unit + 8 * r2, unit + 8 * r3
        add_q4(
            out, data + r0 * half, data + r1 * half, data + r2 * half, data + r3 * half,
            scale + r0 * groups, scale + r1 * groups, scale + r2 * groups, scale + r3 * groups,
            matrix[MIN] - matrix[SCALE],
            h0 * load_real(u0), h1 * load_real(u1), h2 * load_real(u2), h3 * load_real(u3),
            h0 * load_real(u0 + 4), h1 * load_real(u1 + 4), h2 * load_real(u2 + 4), h3 * load_real(u3 + 4), blocks,
        )  # fmt: skip
    elif kind == F32:
        data, size = matrix[DATA] + 4 * first, 4 * columns
        add_f32(out, data + r0 * size, data + r1 * size, data + r2 * size, data + r3 * size, h0, h1, h2, h3, blocks)
    else:
        data, size = matrix[DATA] + 2 * first, 2 * columns
        w0, w1, w2, w3 = data + r0 * size, data + r1 * size, data + r2 * size, data + r3 * size
        if kind == F16:
            add_f16(out, w0, w1, w2, w3, h0, h1, h2, h3, blocks)
        else:
            add_bf16(out, w0, w1, w2, w3, h0, h1, h2, h3, blocks)
