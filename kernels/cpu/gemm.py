"""Matrix times several activation rows: panels of 16 weight rows are unpacked once and used for all of them."""

from __future__ import annotations

from svdengine.kernels.cpu.amx import end_tiles, start_tiles
from svdengine.kernels.cpu.formats.dispatch import pack_columns, pack_panel
from svdengine.kernels.cpu.formats.kernels import PANEL
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.matrix import ACTIVATION_BITS, COLUMNS
from svdengine.kernels.cpu.pieces import piece
from svdengine.kernels.cpu.simd import load_f32, store_f32
from svdengine.kernels.cpu.tile import float_tiles, integer_tiles

FLOAT_DEPTH = 1024  # columns of a float panel: 64 KiB, half of a small L2 cache


@jit
def fill_bias(bias, out, out_stride, n):
    """out (n, 16) = bias in every row."""
    value = load_f32(bias)
    for t in range(n):
        store_f32(out + t * out_stride, value)


@piece
def gemm(matrix, bias, x, x_stride, quantized, quantized_stride, n, out, out_stride, first, last, scratch):
    """out[:, first..last] = x times the matrix's rows first..last, for n rows; first is a multiple of 16."""
    columns, bits = matrix[COLUMNS], matrix[ACTIVATION_BITS]
    depth = columns if bits < 32 else FLOAT_DEPTH
    staging, panel = scratch, scratch + 2048
    tiles = bits < 32 and start_tiles(n)
    for row in range(first, last, PANEL):
        to = out + 4 * row
        fill_bias(bias + 4 * row, to, out_stride, n)
        for start in range(0, columns, depth):
            stop = min(columns, start + depth)
            pack_panel(matrix, row, start, stop, panel, staging)
            if bits < 32:
                integer_tiles(panel, quantized, quantized_stride, columns, to, out_stride, n, tiles)
            else:
                float_tiles(panel, x + 4 * start, x_stride, stop - start, to, out_stride, n)
    end_tiles(tiles)


@piece
def gemm_transposed(matrix, bias, x, x_stride, n, out, out_stride, depth, first, last, scratch):
    """out[:, first..last] = x (n, depth) times a neuron-major matrix's columns first..last; depth is padded."""
    for column in range(first, last, PANEL):
        fill_bias(bias + 4 * column, out + 4 * column, out_stride, n)
        for start in range(0, depth, FLOAT_DEPTH):
            stop = min(depth, start + FLOAT_DEPTH)
            pack_columns(matrix, column, start, stop, scratch)
            float_tiles(scratch, x + 4 * start, x_stride, stop - start, out + 4 * column, out_stride, n)
