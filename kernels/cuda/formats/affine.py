"""What q4 and q6 share: unsigned levels with a scale and a minimum a group, w = row[0] * scale * q - row[1] * min.

A chunk is 16 bytes of low halves, as q4 has them: 16 columns of a group of 32 in the low halves of bytes, and those 32
columns on in the high ones. The minimum's part of a product is min times the sum of the group's activations.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from svdengine.kernels.cuda.byte_pairs import small_levels
from svdengine.kernels.cuda.formats.fours import add_four
from svdengine.kernels.cuda.formats.kernels import FormatKernels
from svdengine.kernels.cuda.formats.tiles import TileKernels, integer_product
from svdengine.kernels.cuda.integer_dot import dot_unsigned_16
from svdengine.kernels.cuda.intrinsics import as_float, jit, ldg128, u8x4
from svdengine.kernels.cuda.tensor_cores import mma_us, mma_uu
from svdengine.kernels.formats import WeightFormat

HALVES = np.uint32(0x0F0F0F0F)
FOUR = np.uint32(4)
_HALF = np.float32(0.5)


@jit(device=True)
def _column_of(j, k):
    return 64 * (j >> 1) + 16 * (j & 1) + 4 * (k & 3) + 32 * (k >> 2)


@jit(device=True)
def _scales(scale, low, row, r, stride, j):
    """Steps and minima of chunk j of row r: of its low halves, then of its high ones."""
    group = r * (stride >> 5) + (j >> 1 << 1)
    step, least = row[2 * r], row[2 * r + 1]
    return (
        step * np.float32(scale[group]),
        step * np.float32(scale[group + 1]),
        least * np.float32(low[group]),
        least * np.float32(low[group + 1]),
    )


@jit(device=True)
def _less(total, shift):
    """Four sums less the minima's part."""
    return total[0] - shift, total[1] - shift, total[2] - shift, total[3] - shift


@jit(device=True)
def _finish(total):
    low, high = total[8][0], total[8][1]
    return (
        _less(total[0], low),
        _less(total[1], low),
        _less(total[2], low),
        _less(total[3], low),
        _less(total[4], high),
        _less(total[5], high),
        _less(total[6], high),
        _less(total[7], high),
    )


@jit(device=True)
def _units(row, r):
    return row[2 * r], row[2 * r + 1]


def affine_tiles(load: Any, levels: Any, high_part: float = 1.0) -> TileKernels:
    """Tiles of a format with these levels; load, levels: as in `TileKernels`.

    `load` gives levels of the second group divided by `high_part`.
    """
    part = np.float32(high_part)

    @jit(device=True)
    def scales(scale, low, units, at):
        step, least = units
        return (
            step * np.float32(scale[at]),
            least * np.float32(low[at]),
            step * part * np.float32(scale[at + 1]),
            least * np.float32(low[at + 1]),
        )

    return TileKernels(
        row_tiles=2,
        items=8,
        load=load,
        product=integer_product(mma_us, mma_uu),
        shifted=True,
        units=_units,
        scales=scales,
        levels=levels,
        as_numbers=small_levels,
        second_unit=1 / high_part,
    )


def affine_kernels(
    name: WeightFormat,
    load: Any,
    low_codes: Any,
    high_codes: Any,
    level: Any,
    tiles: TileKernels,
    high_part: float = 1.0,
    at_once: int = 4,
    listed_at_once: int = 4,
) -> FormatKernels:
    """The kernels of a format with these levels.

    load, at_once and listed_at_once: as in `FormatKernels`; the low halves come first. low_codes, high_codes: (w, k, j)
    -> the four levels of the low halves of word k of a chunk, a byte each, or of the high ones, divided by `high_part`.
    level: (words, index) -> a level by its index in the matrix, rows one after another.
    """
    part = np.float32(high_part)

    @jit(device=True)
    def dot(w, scale, low, row, r, stride, x, at, j):
        # So written, chunks 32 apart need no addresses of their own.
        group = j - (j & 1)
        codes = at + 16 * j - 8 * (j & 1)
        below = low_codes(w, 0, j), low_codes(w, 1, j), low_codes(w, 2, j), low_codes(w, 3, j)
        above = high_codes(w, 0, j), high_codes(w, 1, j), high_codes(w, 2, j), high_codes(w, 3, j)
        first = np.float32(dot_unsigned_16(below, x, codes))
        then = np.float32(dot_unsigned_16(above, x, codes + 16))
        values = ldg128(x, at + (stride >> 1) + 2 * group)  # steps and sums of two groups
        group += r * (stride >> 5)
        product = first * (as_float(values[0]) * np.float32(scale[group]))
        product += then * (as_float(values[2]) * (part * np.float32(scale[group + 1])))
        least = as_float(values[1]) * np.float32(low[group]) + as_float(values[3]) * np.float32(low[group + 1])
        # Two chunks share the groups, and take off half of the minima's part each.
        return row[2 * r] * product - (_HALF * row[2 * r + 1]) * least

    @jit(device=True)
    def add(total, h, w, scale, low, row, r, stride, j):
        s = _scales(scale, low, row, r, stride, j)
        first, then, minima = h * s[0], h * s[1] * part, total[8]
        return (
            add_four(total[0], first, u8x4(low_codes(w, 0, j))),
            add_four(total[1], first, u8x4(low_codes(w, 1, j))),
            add_four(total[2], first, u8x4(low_codes(w, 2, j))),
            add_four(total[3], first, u8x4(low_codes(w, 3, j))),
            add_four(total[4], then, u8x4(high_codes(w, 0, j))),
            add_four(total[5], then, u8x4(high_codes(w, 1, j))),
            add_four(total[6], then, u8x4(high_codes(w, 2, j))),
            add_four(total[7], then, u8x4(high_codes(w, 3, j))),
            (minima[0] + h * s[2], minima[1] + h * s[3], minima[2], minima[3]),
        )

    @jit(device=True)
    def weight(words, scale, low, row, r, column, stride):
        index = r * stride + column
        q = np.float32(level(words, index))
        return row[2 * r] * np.float32(scale[index >> 5]) * q - row[2 * r + 1] * np.float32(low[index >> 5])

    return FormatKernels(
        name=name,
        chunk_columns=32,
        load_chunk=load,
        dot_chunk=dot,
        add_chunk=add,
        column_of=_column_of,
        weight=weight,
        most_sums=2,
        at_once=at_once,
        listed_at_once=listed_at_once,
        other_sums=1,
        finish=_finish,
        tiles=tiles,
    )
