"""Sums of weighted rows of neuron-major matrices: out[t] += hidden[t, 0] * row 0 + hidden[t, 1] * row 1 + ...

Formats of whole levels are added up in integers (formats/sums.py), so that an output does not depend on which rows
are added at once, and a row whose weight is 0 changes nothing. Others are added one row after the other, which has the
same properties.
"""

from __future__ import annotations

import numpy as np

from svdengine.kernels.cpu.formats.dispatch import add_four, add_many, finish, scale_four
from svdengine.kernels.cpu.formats.sums import ROWS
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.matrix import BOUNDS, COLUMNS, DATA, ROW_BYTES
from svdengine.kernels.cpu.pieces import piece
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

TOGETHER = 32  # outputs whose sums are made at once; rows that wait in the second-level cache for all of them
CHUNK = 128  # the same where rows are added up in integers, several at once
AHEAD = 8  # listed rows that are on their way from memory
PART = 512  # columns that are added, and asked for, at once
_ROOM = np.float32(2e9 / 128)  # what the sizes of weights may add up to: an int32 of products with levels of a byte
_ZERO = np.float32(0)
# In the scratch memory: two lists of ROWS addresses, the units of TOGETHER outputs, then planes of the weights of ROWS
# rows, for each output what `finish` takes off, and numbers and weights of the rows of a chunk.
_NEXT, _UNITS = 8 * ROWS, 16 * ROWS
_PLANES = _UNITS + 4 * TOGETHER


@piece
def add_rows(matrix, rows, count, hidden, hidden_stride, n, out, out_stride, sums, sums_stride, first, last, scratch):
    """out[t, first..last] += the sum of `count` rows, their numbers at `rows`, times hidden[t], for n outputs t.

    sums: int32 of the size of `out`, zeros before and after. scratch: 5 bytes a column, 8 a row and 8 KiB.
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
    """The unit of a sum's weights: they fit 16 bits, and what is added up fits 32 whatever the levels are.

    Not finite where a weight is not, so that the sum is not either: integers would hide it.
    """
    largest, total = _ZERO, _ZERO
    for k in range(count):
        size = abs(load_real(hidden + 4 * k)) * load_real(matrix[BOUNDS] + 4 * load_int(rows + 4 * k))
        largest = max(largest, size)
        total += size
    return max(largest / LARGEST, total / _ROOM) if total == total else total


@jit
def add_in_integers(
    matrix, rows, count, hidden, hidden_stride, n, out, out_stride, sums, sums_stride, first, last, scratch
):  # fmt: skip
    """See `add_rows`. Of several outputs each takes from a chunk the rows whose weight is not 0."""
    blocks, groups = (last - first) // 64, (last - first) // 32
    stride = (groups // 16 * 16 + 32) * 4
    chunk = CHUNK if n > 1 else count + 4
    side = scratch + _PLANES + ROWS // 2 * stride
    numbers = side + n * stride
    weights = numbers + 4 * chunk
    for t in range(n):
        store_real(scratch + _UNITS + 4 * t, unit_of(matrix, rows, count, hidden + t * hidden_stride))
        for g in range(0, stride, 64):
            store_f32(side + t * stride + g, zero_f32())
    fetch_first(matrix, rows, count, first, last)
    for start in range(0, count, chunk):
        size, asked = min(chunk, count - start), start + chunk
        for t in range(n):
            h, unit = hidden + t * hidden_stride + 4 * start, load_real(scratch + _UNITS + 4 * t)
            found = choose_rows(rows + 4 * start, h, size, n > 1, unit, numbers, weights)
            to = sums + t * sums_stride + 4 * first
            for k in range(0, found, ROWS):
                some = min(ROWS, found - k)
                add_some(
                    matrix, numbers, k, found, weights, first, groups, stride, side + t * stride, to, some, scratch
                )
                asked = fetch_some(matrix, rows, asked, min(asked + AHEAD, start + 2 * chunk, count), first, last)
        fetch_some(matrix, rows, asked, min(start + 2 * chunk, count), first, last)
    for t in range(n):
        to, total = out + t * out_stride + 4 * first, sums + t * sums_stride + 4 * first
        finish(matrix, to, total, side + t * stride, load_real(scratch + _UNITS + 4 * t), blocks)


@jit
def choose_rows(rows, hidden, count, skip, unit, numbers, weights):
    """List rows and hidden / unit, without those that are 0 if told to `skip` them; returns how many."""
    inverse = np.float32(1) / unit if unit > _ZERO else _ZERO
    found = 0
    for k in range(count):
        h = load_real(hidden + 4 * k)
        if h != _ZERO or not skip:
            store_int(numbers + 4 * found, load_int(rows + 4 * k))
            store_real(weights + 4 * found, h * inverse)
            found += 1
    while found % 4 != 0:  # fours are full
        store_int(numbers + 4 * found, load_int(numbers + 4 * found - 4))
        store_real(weights + 4 * found, _ZERO)
        found += 1
    return found


@jit
def add_some(matrix, numbers, k, count, weights, first, groups, stride, side, sums, some, scratch):
    """sums += `some` rows from the k-th of a list of `count`, both multiples of 4."""
    planes, start, size = scratch + _PLANES, first // 32, matrix[ROW_BYTES]
    data = matrix[DATA] + first * size // matrix[COLUMNS]
    for lane in range(some):
        store_address(scratch + 8 * lane, data + load_int(numbers + 4 * (k + lane)) * size)
        store_address(scratch + _NEXT + 8 * lane, data + listed(numbers, k + ROWS + lane, count) * size)
    for four in range(0, some, 4):
        at = 4 * (k + four)
        to = planes + four // 2 * stride
        scale_four(matrix, numbers + at, weights + at, to, stride, side, start, start + groups)
    add_many(matrix, scratch, scratch + _NEXT, planes, stride, sums, some // 4, groups // 2)


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
def fetch_some(matrix, rows, start, stop, first, last):
    """Ask for columns first..last of the rows that a list has from `start` to `stop`. Returns `stop`, or `start`."""
    for k in range(start, stop):
        fetch_part(matrix, load_int(rows + 4 * k), first, last)
    return max(start, stop)


@jit
def fetch_part(matrix, row, first, last):
    """Ask for the cache lines of columns first..last of a row."""
    size = matrix[ROW_BYTES]
    at = matrix[DATA] + row * size
    for line in range(first * size // matrix[COLUMNS], last * size // matrix[COLUMNS], 64):
        prefetch(at + line)
