"""Matrix times one activation vector, or a few: dot products of stored rows, in every weight format.

An activation vector is given in float32 and as quantize.py lays it out; the format reads one of them.
"""

from __future__ import annotations

from svdengine.kernels.cpu.formats.dispatch import dot_four, dot_one_row, dot_row
from svdengine.kernels.cpu.pieces import piece
from svdengine.kernels.cpu.simd import load_real, store_real

# How far ahead of a stream of rows memory is asked for: beyond the 4 KiB page that the hardware's prefetch stops at.
STREAM_AHEAD = 6144
_WEIGHT_ROWS, _ROWS = 32, 16  # of weights and of activations at once, so that both wait in the second-level cache


@piece
def gemv_few(matrix, bias, x, x_stride, quantized, quantized_stride, n, out, out_stride, first, last):
    """As `gemv` for a few activation rows: each stored row is read from memory once, and then found in the cache."""
    for row in range(first, last):
        add = load_real(bias + 4 * row)
        ahead = STREAM_AHEAD
        for i in range(n):
            value = dot_row(matrix, row, x + i * x_stride, quantized + i * quantized_stride, ahead)
            store_real(out + i * out_stride + 4 * row, value + add)
            ahead = 0


@piece
def gemv_many(matrix, bias, x, x_stride, quantized, quantized_stride, n, out, out_stride, first, last):
    """As `gemv_few` for many activation rows, bit for bit: four stored rows at a time."""
    for start in range(first, last, _WEIGHT_ROWS):
        stop = min(last, start + _WEIGHT_ROWS)
        whole = start + (stop - start) // 4 * 4
        for rows in range(0, n, _ROWS):
            for row in range(start, whole, 4):
                for i in range(rows, min(n, rows + _ROWS)):
                    to = out + i * out_stride + 4 * row
                    dot_four(
                        matrix, row, row + 1, row + 2, row + 3, row + 4, row + 5, row + 6, row + 7,
                        x + i * x_stride, quantized + i * quantized_stride, to,
                    )  # fmt: skip
                    for lane in range(4):
                        store_real(to + 4 * lane, load_real(to + 4 * lane) + load_real(bias + 4 * (row + lane)))
        for row in range(whole, stop):
            for i in range(n):
                value = dot_one_row(matrix, row, x + i * x_stride, quantized + i * quantized_stride, 0)
                store_real(out + i * out_stride + 4 * row, value + load_real(bias + 4 * row))


@piece
def gemv(matrix, bias, x, quantized, out, first, last):
    """out[first..last] = rows first..last of a matrix times one activation row, plus bias."""
    for row in range(first, last):
        store_real(out + 4 * row, dot_row(matrix, row, x, quantized, STREAM_AHEAD) + load_real(bias + 4 * row))
