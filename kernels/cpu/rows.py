"""Sums of weighted rows: out += h0 * row0 + ... + h3 * row3, for neuron-major matrices in every weight format.

Rows are added one after the other, so a row whose weight is 0 changes nothing, not even the rounding.
"""

from __future__ import annotations

import numpy as np

from svdengine.kernels.cpu.formats.dispatch import add_four, add_some
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.matrix import COLUMNS, DATA, ROW_BYTES
from svdengine.kernels.cpu.matrix import ROWS as MATRIX_ROWS
from svdengine.kernels.cpu.pieces import piece
from svdengine.kernels.cpu.simd import load_real, prefetch

ROWS = 4  # added in one pass over the columns
TOGETHER = 32  # rows that wait in the second-level cache for all rows of a batch


@piece
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
        add_some(matrix, i, i, i, i, load_real(weights + 4 * i), zero, zero, zero, out, 0, columns)


@piece
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
                add_some(matrix, i, i, i, i, load_real(at + 4 * i), zero, zero, zero, to, first, last)


@jit
def fetch_part(matrix, row, first, last):
    """Ask for the cache lines of columns first..last of a row."""
    size = matrix[ROW_BYTES]
    at = matrix[DATA] + row * size
    for line in range(first * size // matrix[COLUMNS], last * size // matrix[COLUMNS], 64):
        prefetch(at + line)
