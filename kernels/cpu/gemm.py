"""Matrix times several activation rows: panels of 16 weight rows are unpacked once and used for all of them."""

from __future__ import annotations

import numpy as np

from svdengine.kernels.cpu.dot import BIAS, copy_biased, unpack_nibbles
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.model import BF16, COLUMNS, DATA, F16, F32, FORMAT, MIN, Q4, Q8, ROW, ROWS, SCALE
from svdengine.kernels.cpu.simd import (
    load_bf16,
    load_f16,
    load_f32,
    load_half,
    load_i8_as_f32,
    load_nibbles_as_f32,
    load_real,
    load_u8_as_real,
    splat_f32,
    store_f32,
    store_real,
    zero_f32,
)
from svdengine.kernels.cpu.tile import (
    PANEL,
    coarse_tile_2,
    coarse_tile_4,
    coarse_tile_8,
    float_tile_2,
    float_tile_4,
    float_tile_8,
    integer_tile_2,
    integer_tile_4,
    integer_tile_8,
    transpose_words,
)

FLOAT_DEPTH = 1024  # columns of a float panel: 64 KiB, half of a small L2 cache
_BIAS = np.float32(BIAS)


@jit
def pack_integer_panel(matrix, first, panel, staging):
    """16 rows of a q8 or q4 matrix from row `first`; rows beyond the last get scale 0."""
    columns, rows, kind = matrix[COLUMNS], matrix[ROWS], matrix[FORMAT]
    for lane in range(PANEL):
        row = first + lane
        present = row < rows
        row = min(row, rows - 1)
        groups = row * (columns // 32)
        for group in range(columns // 32):
            scale = np.float32(0)
            low = np.float32(0)
            if present and kind == Q8:
                scale = load_half(matrix[SCALE] + 2 * (groups + group))
                low = -_BIAS * scale
            elif present:
                at = matrix[ROW] + 8 * row
                scale = load_real(at) * load_u8_as_real(matrix[SCALE] + groups + group)
                low = -load_real(at + 4) * load_u8_as_real(matrix[MIN] + groups + group)
            store_real(panel + 640 * group + 4 * lane, scale)
            store_real(panel + 640 * group + 64 + 4 * lane, low)
    for column in range(0, columns, 64):
        for lane in range(PANEL):
            row = min(first + lane, rows - 1)
            if kind == Q8:
                copy_biased(staging + 64 * lane, matrix[DATA] + row * columns + column)
            else:
                unpack_nibbles(staging + 64 * lane, matrix[DATA] + (row * columns + column) // 2)
        transpose_words(staging, 64, staging + 1024)
        for step in range(16):
            to = panel + 640 * (column // 32 + step // 8) + 128 + 64 * (step % 8)
            store_f32(to, load_f32(staging + 1024 + 64 * step))


@jit
def load_weights(matrix, row, column):
    """16 weights of a row from a column that is a multiple of 16, dequantised."""
    columns, kind = matrix[COLUMNS], matrix[FORMAT]
    at = row * columns + column
    if kind == F32:
        return load_f32(matrix[DATA] + 4 * at)
    if kind == F16:
        return load_f16(matrix[DATA] + 2 * at)
    if kind == BF16:
        return load_bf16(matrix[DATA] + 2 * at)
    if kind == Q8:
        return load_i8_as_f32(matrix[DATA] + at) * splat_f32(load_half(matrix[SCALE] + at // 32 * 2))
    start = row * columns + column // 64 * 64
    within = column % 64
    q = load_nibbles_as_f32(matrix[DATA] + start // 2 + within % 32, within // 32 * 4)
    scale = load_real(matrix[ROW] + 8 * row) * load_u8_as_real(matrix[SCALE] + at // 32)
    low = load_real(matrix[ROW] + 8 * row + 4) * load_u8_as_real(matrix[MIN] + at // 32)
    return q * splat_f32(scale) - splat_f32(low)


@jit
def pack_float_panel(matrix, first, start, stop, panel, staging):
    """Columns start..stop of 16 rows of any matrix, as float32; rows beyond the last are zeros."""
    for column in range(start, stop, 16):
        for lane in range(PANEL):
            row = first + lane
            if row < matrix[ROWS]:
                store_f32(staging + 64 * lane, load_weights(matrix, row, column))
            else:
                store_f32(staging + 64 * lane, zero_f32())
        transpose_words(staging, 64, panel + 64 * (column - start))


@jit
def pack_transposed_panel(matrix, first, start, stop, panel):
    """As `pack_float_panel` for a neuron-major matrix: rows start..stop, 16 columns from `first`."""
    for row in range(start, stop):
        to = panel + 64 * (row - start)
        if row < matrix[ROWS]:
            store_f32(to, load_weights(matrix, row, first))
        else:
            store_f32(to, zero_f32())


@jit
def integer_tiles(panel, x, x_stride, columns, out, out_stride, n):
    """out (n, 16) += panel times n quantised rows. Rows up to the next tile size may be read and written."""
    t = 0
    while t < n:
        if n - t > 4:
            integer_tile_8(panel, x + t * x_stride, x_stride, columns, out + t * out_stride, out_stride)
            t += 8
        elif n - t > 2:
            integer_tile_4(panel, x + t * x_stride, x_stride, columns, out + t * out_stride, out_stride)
            t += 4
        else:
            integer_tile_2(panel, x + t * x_stride, x_stride, columns, out + t * out_stride, out_stride)
            t += 2


@jit
def coarse_tiles(panel, x, x_stride, columns, out, out_stride, n):
    """As `integer_tiles`, with the high plane of activations alone."""
    t = 0
    while t < n:
        if n - t > 4:
            coarse_tile_8(panel, x + t * x_stride, x_stride, columns, out + t * out_stride, out_stride)
            t += 8
        elif n - t > 2:
            coarse_tile_4(panel, x + t * x_stride, x_stride, columns, out + t * out_stride, out_stride)
            t += 4
        else:
            coarse_tile_2(panel, x + t * x_stride, x_stride, columns, out + t * out_stride, out_stride)
            t += 2


@jit
def float_tiles(panel, x, x_stride, columns, out, out_stride, n):
    """As `integer_tiles`, for float32 panels and rows."""
    t = 0
    while t < n:
        if n - t > 4:
            float_tile_8(panel, x + t * x_stride, x_stride, columns, out + t * out_stride, out_stride)
            t += 8
        elif n - t > 2:
            float_tile_4(panel, x + t * x_stride, x_stride, columns, out + t * out_stride, out_stride)
            t += 4
        else:
            float_tile_2(panel, x + t * x_stride, x_stride, columns, out + t * out_stride, out_stride)
            t += 2


@jit
def fill_bias(bias, out, out_stride, n):
    """out (n, 16) = bias in every row."""
    value = load_f32(bias)
    for t in range(n):
        store_f32(out + t * out_stride, value)


@jit
def gemm(matrix, bias, x, x_stride, quantized, quantized_stride, n, out, out_stride, first, last, scratch):
    """out[:, first..last] = x times the matrix's rows first..last, for n rows; first is a multiple of 16."""
    columns, kind = matrix[COLUMNS], matrix[FORMAT]
    staging = scratch
    panel = scratch + 2048
    for row in range(first, last, PANEL):
        fill_bias(bias + 4 * row, out + 4 * row, out_stride, n)
        if kind == Q8 or kind == Q4:
            pack_integer_panel(matrix, row, panel, staging)
            if kind == Q8:
                integer_tiles(panel, quantized, quantized_stride, columns, out + 4 * row, out_stride, n)
            else:
                coarse_tiles(panel, quantized, quantized_stride, columns, out + 4 * row, out_stride, n)
        else:
            for start in range(0, columns, FLOAT_DEPTH):
                stop = min(columns, start + FLOAT_DEPTH)
                pack_float_panel(matrix, row, start, stop, panel, staging)
                float_tiles(panel, x + 4 * start, x_stride, stop - start, out + 4 * row, out_stride, n)


@jit
def gemm_transposed(matrix, bias, x, x_stride, n, out, out_stride, depth, first, last, scratch):
    """out[:, first..last] = x (n, depth) times a neuron-major matrix's columns first..last; depth is padded."""
    for column in range(first, last, PANEL):
        fill_bias(bias + 4 * column, out + 4 * column, out_stride, n)
        for start in range(0, depth, FLOAT_DEPTH):
            stop = min(depth, start + FLOAT_DEPTH)
            pack_transposed_panel(matrix, column, start, stop, scratch)
            float_tiles(scratch, x + 4 * start, x_stride, stop - start, out + 4 * column, out_stride, n)
