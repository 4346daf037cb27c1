"""f32, f16 and bf16: weights that are widened to float32 and multiplied with float32 activations."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from svdengine.kernels.cpu.formats.kernels import PANEL, FormatKernels, columns_by, four_by_one
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.matrix import COLUMNS, DATA, ROWS
from svdengine.kernels.cpu.simd import (
    F32V,
    I64,
    address,
    emit_bf16,
    emit_f16,
    f32x16,
    fma,
    fused,
    index,
    load,
    load_f32,
    loop,
    operation,
    real,
    splat,
    store,
    store_f32,
    sum_lanes,
    zero_f32,
)
from svdengine.kernels.cpu.tile import transpose_words
from svdengine.kernels.formats import WeightFormat


def _add_operation(size: int, emit_sixteen: Any) -> Any:
    """The operation that adds four weighted rows; `size`: bytes of a weight."""

    @operation(types.void, address, address, address, address, address, real, real, real, real, index)
    def add(builder, out, w0, w1, w2, w3, h0, h1, h2, h3, blocks):
        """w: addresses of the rows; blocks: of 64 columns."""
        weights = [splat(builder, h) for h in (h0, h1, h2, h3)]

        def body(i, _):
            to = builder.add(out, builder.mul(i, ir.Constant(I64, 256)))
            offset = builder.mul(i, ir.Constant(I64, 64 * size))
            totals = [load(builder, to, F32V, 64 * v) for v in range(4)]
            for w, h in zip((w0, w1, w2, w3), weights, strict=True):
                at = builder.add(w, offset)
                values = [emit_sixteen(builder, at, 16 * size * v) for v in range(4)]
                totals = [fused(builder, value, h, total) for value, total in zip(values, totals, strict=True)]
            for v in range(4):
                store(builder, builder.add(to, ir.Constant(I64, 64 * v)), totals[v])
            return []

        loop(builder, blocks, [], body)

    return add


def float_kernels(name: WeightFormat, size: int, emit_sixteen: Any) -> FormatKernels:
    """The kernels of a float format; `size`: bytes of a weight; `emit_sixteen(builder, at, offset)` widens 16."""
    add_rows = _add_operation(size, emit_sixteen)

    @operation(f32x16, address)
    def load_sixteen(builder, at):
        """16 weights, widened."""
        return emit_sixteen(builder, at, 0)

    @jit
    def dot_row(matrix, row, x, quantized, ahead):
        columns = matrix[COLUMNS]
        weights = matrix[DATA] + size * row * columns
        a = zero_f32()
        b = zero_f32()
        for i in range(0, columns, 32):
            a = fma(load_sixteen(weights + size * i), load_f32(x + 4 * i), a)
            b = fma(load_sixteen(weights + size * i + 16 * size), load_f32(x + 4 * i + 64), b)
        return sum_lanes(a + b)

    @jit
    def add_four(matrix, r0, r1, r2, r3, h0, h1, h2, h3, out, first, last):
        data, stride = matrix[DATA] + size * first, size * matrix[COLUMNS]
        add_rows(
            out + 4 * first, data + r0 * stride, data + r1 * stride, data + r2 * stride, data + r3 * stride,
            h0, h1, h2, h3, (last - first) // 64,
        )  # fmt: skip

    @jit
    def load_weights(matrix, row, column):
        return load_sixteen(matrix[DATA] + size * (row * matrix[COLUMNS] + column))

    @jit
    def pack_panel(matrix, first, start, stop, panel, staging):
        for column in range(start, stop, 16):
            for lane in range(PANEL):
                row = first + lane
                if row < matrix[ROWS]:
                    store_f32(staging + 64 * lane, load_weights(matrix, row, column))
                else:
                    store_f32(staging + 64 * lane, zero_f32())
            transpose_words(staging, 64, panel + 64 * (column - start))

    return FormatKernels(
        name, dot_row, four_by_one(dot_row), load_weights, pack_panel, columns_by(load_weights), add_four=add_four
    )


F32_KERNELS = float_kernels("f32", 4, lambda builder, at, offset: load(builder, at, F32V, offset))
F16_KERNELS = float_kernels("f16", 2, emit_f16)
BF16_KERNELS = float_kernels("bf16", 2, emit_bf16)
