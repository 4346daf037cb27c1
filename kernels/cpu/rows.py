"""Sums of weighted rows of neuron-major matrices: out[t] += hidden[t, 0] * row 0 + hidden[t, 1] * row 1 + ...

Formats of whole levels are added up in integers (formats/sums.py), so that an output does not depend on which rows
are added at once, and a row whose weight is 0 changes nothing. Others are added one row after the other, which has the
same properties.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.cpu.formats.dispatch import ALL, add_four, add_many, finish, scale_four
from svdengine.kernels.cpu.formats.sums import ROWS
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.matrix import BOUNDS, COLUMNS, DATA, ROW_BYTES
from svdengine.kernels.cpu.quantize import LARGEST
from svdengine.kernels.cpu.simd import (
    load_int,
    load_real,
    prefetch,
    store_address,
    store_f32,
    store_int,
    store_real,
    zero_f32,
)
from svdengine.kernels.formats import Parts

TOGETHER = 32  # outputs whose sums are made at once; rows that wait in the second-level cache for all of them
AHEAD = 8  # listed rows that are on their way from memory
PART = 512  # columns that are added, and asked for, at once
INTEGER_FORMATS = frozenset(kernels.name for kernels in ALL if kernels.sums is not None)
_ROOM = np.float32(2e9 / 128)  # what the sizes of weights may add up to: an int32 of products with levels of a byte
_ZERO = np.float32(0)
# In the scratch memory: two lists of ROWS addresses, numbers and weights of as many rows, (planes, sums) and the units
# of TOGETHER outputs.
_NEXT, _NUMBERS = 8 * ROWS, 16 * ROWS
_WEIGHTS, _TABLE = _NUMBERS + 4 * ROWS, _NUMBERS + 8 * ROWS
_UNITS = _TABLE + 16 * TOGETHER
_PLANES = _UNITS + 4 * TOGETHER


def row_bounds(parts: Parts) -> NDArray[np.float32]:
    """The largest scale of each row, (..., rows), of a matrix in one of INTEGER_FORMATS."""
    scales = parts[".scale"]
    if scales.dtype == np.float16:  # compared as integers, which has the same order and is many times faster
        largest = (scales.view(np.uint16) & 0x7FFF).max(-1).view(np.float16).astype(np.float32)
        return np.ascontiguousarray(largest)
    return np.ascontiguousarray(np.abs(parts[".row"][..., 0]) * scales.max(-1))


@jit
def add_rows(matrix, rows, count, hidden, hidden_stride, n, out, out_stride, sums, sums_stride, first, last, scratch):
    """out[t, first..last] += the sum of `count` rows, their numbers at `rows`, times hidden[t], for n outputs t.

    sums: int32 of the size of `out`, zeros before and after. scratch: 36 bytes a column and 40 KiB.
    """
    if first >= last:
        return
    for t in range(0, n, TOGETHER):
        h, to, total = hidden + t * hidden_stride, out + t * out_stride, sums + t * sums_stride
        several = min(TOGETHER, n - t)
        if matrix[BOUNDS] != 0:
            add_in_integers(
                matrix, rows, count, h, hidden_stride, several, to, out_stride, total, sums_stride, first, last, scratch
            )
        else:
            add_in_order(matrix, rows, count, h, hidden_stride, several, to, out_stride, first, last, scratch)


@jit
def unit_of(matrix, rows, count, hidden):
    """The unit of a sum's weights: they fit 16 bits, and what is added up fits 32 whatever the levels are."""
    largest, total = _ZERO, _ZERO
    for k in range(count):
        size = abs(load_real(hidden + 4 * k)) * load_real(matrix[BOUNDS] + 4 * load_int(rows + 4 * k))
        largest = max(largest, size)
        total += size
    return max(largest / LARGEST, total / _ROOM)


@jit
def add_in_integers(
    matrix, rows, count, hidden, hidden_stride, n, out, out_stride, sums, sums_stride, first, last, scratch
):  # fmt: skip
    """See `add_rows`."""
    blocks, start, stop = (last - first) // 64, first // 32, last // 32
    stride = ((stop - start) // 16 * 16 + 32) * 4
    side = scratch + _PLANES + n * ROWS // 2 * stride
    for t in range(n):
        store_real(scratch + _UNITS + 4 * t, unit_of(matrix, rows, count, hidden + t * hidden_stride))
        for g in range(0, stride, 64):
            store_f32(side + t * stride + g, zero_f32())
    fetch_first(matrix, rows, count, first, last)
    data = matrix[DATA] + first * matrix[ROW_BYTES] // matrix[COLUMNS]
    for k in range(0, count, ROWS):
        for lane in range(ROWS):
            row, later = listed(rows, k + lane, count), listed(rows, k + ROWS + lane, count)
            store_int(scratch + _NUMBERS + 4 * lane, row)
            store_address(scratch + 8 * lane, data + row * matrix[ROW_BYTES])
            store_address(scratch + _NEXT + 8 * lane, data + later * matrix[ROW_BYTES])
        outputs = 0
        for t in range(n):
            h, unit = hidden + t * hidden_stride + 4 * k, load_real(scratch + _UNITS + 4 * t)
            if not scale_hidden(h, min(ROWS, count - k), unit, scratch + _WEIGHTS):
                continue
            planes, of_output = scratch + _PLANES + t * ROWS // 2 * stride, scratch + _TABLE + 16 * outputs
            for four in range(0, 4 * ROWS, 16):
                numbers, weights = scratch + _NUMBERS + four, scratch + _WEIGHTS + four
                to = planes + four // 8 * stride
                scale_four(matrix, numbers, weights, to, stride, side + t * stride, start, stop)
            store_address(of_output, planes)
            store_address(of_output + 8, sums + t * sums_stride + 4 * first)
            outputs += 1
        if outputs > 0:
            add_many(matrix, scratch, scratch + _NEXT, scratch + _TABLE, outputs, stride, blocks)
    for t in range(n):
        to, total = out + t * out_stride + 4 * first, sums + t * sums_stride + 4 * first
        finish(matrix, to, total, side + t * stride, load_real(scratch + _UNITS + 4 * t), blocks)


@jit
def scale_hidden(hidden, count, unit, out):
    """out[0..ROWS] = hidden / unit, and zeros from `count` on. Returns whether any is not 0."""
    inverse = np.float32(1) / unit if unit > _ZERO else _ZERO
    found = False
    for lane in range(ROWS):
        h = load_real(hidden + 4 * lane) * inverse if lane < count else _ZERO
        found = found or h != _ZERO
        store_real(out + 4 * lane, h)
    return found


@jit
def add_in_order(matrix, rows, count, hidden, hidden_stride, n, out, out_stride, first, last, scratch):
    """See `add_rows`. A few rows wait in the cache while one output after the other takes what it has of them."""
    chosen, weights = scratch, scratch + 4 * TOGETHER
    for start in range(0, count, TOGETHER):
        for t in range(n):
            found = 0
            for k in range(start, min(count, start + TOGETHER)):
                h = load_real(hidden + t * hidden_stride + 4 * k)
                if h != _ZERO:
                    store_int(chosen + 4 * found, load_int(rows + 4 * k))
                    store_real(weights + 4 * found, h)
                    found += 1
            add_chosen(matrix, chosen, found, weights, out + t * out_stride, first, last)


@jit
def add_chosen(matrix, rows, count, hidden, out, first, last):
    """out[first..last] += hidden[k] times row rows[k], one after the other, four in one pass over the columns."""
    fetch_first(matrix, rows, count, first, last)
    for k in range(0, count, 4):
        r0, h0 = load_int(rows + 4 * k), load_real(hidden + 4 * k)
        h1 = load_real(hidden + 4 * k + 4) if k + 1 < count else _ZERO
        h2 = load_real(hidden + 4 * k + 8) if k + 2 < count else _ZERO
        h3 = load_real(hidden + 4 * k + 12) if k + 3 < count else _ZERO
        r1, r2, r3 = listed(rows, k + 1, count), listed(rows, k + 2, count), listed(rows, k + 3, count)
        for c in range(first, last, PART):
            stop = min(c + PART, last)
            for lane in range(AHEAD, min(AHEAD + 4, count - k)):
                fetch_part(matrix, load_int(rows + 4 * (k + lane)), c, stop)
            add_four(matrix, r0, r1, r2, r3, h0, h1, h2, h3, out, c, stop)


@jit
def listed(rows, k, count):
    """The k-th number of a list, or the last one where the list is over."""
    return load_int(rows + 4 * min(k, count - 1))


@jit
def list_range(rows, first, last):
    """List the numbers first..last, one int32 each."""
    for i in range(first, last):
        store_int(rows + 4 * (i - first), i)


@jit
def fetch_first(matrix, rows, count, first, last):
    """Ask for columns first..last of the first rows of a list; what reads them asks for rows that are AHEAD."""
    for k in range(min(AHEAD, count)):
        fetch_part(matrix, load_int(rows + 4 * k), first, last)


@jit
def fetch_part(matrix, row, first, last):
    """Ask for the cache lines of columns first..last of a row."""
    size = matrix[ROW_BYTES]
    at = matrix[DATA] + row * size
    for line in range(first * size // matrix[COLUMNS], last * size // matrix[COLUMNS], 64):
        prefetch(at + line)
