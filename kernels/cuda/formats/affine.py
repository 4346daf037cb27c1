"""What q4 and q6 share: unsigned levels with a scale and a minimum a group, w = row[0] * scale * q - row[1] * min.

A chunk is 16 bytes of low halves, as q4 has them: 16 columns of a group of 32 in the low halves of bytes, and those 32
columns on in the high ones. The minimum's part of a product is min times the sum of the group's activations.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from svdengine.kernels.cuda.formats.kernels import FormatKernels
from svdengine.kernels.cuda.intrinsics import as_float, jit, ldg128
from svdengine.kernels.formats import WeightFormat

HALVES = np.uint32(0x0F0F0F0F)
FOUR = np.uint32(4)
_NOTHING = np.float32(0), np.float32(0)


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
def _add_dot(sums, levels, x, at):
    """Sums + four levels times four activations from item `at`, and + those activations."""
    a = ldg128(x, at)
    a0, a1, a2, a3 = as_float(a[0]), as_float(a[1]), as_float(a[2]), as_float(a[3])
    product = sums[0] + levels[0] * a0
    product += levels[1] * a1
    product += levels[2] * a2
    return product + levels[3] * a3, sums[1] + ((a0 + a1) + (a2 + a3))


@jit(device=True)
def _add_levels(total, h, levels, shift):
    """total + (h * levels - shift), of four."""
    return (
        total[0] + (h * levels[0] - shift),
        total[1] + (h * levels[1] - shift),
        total[2] + (h * levels[2] - shift),
        total[3] + (h * levels[3] - shift),
    )


def affine_kernels(
    name: WeightFormat, loads: int, load: Any, low_levels: Any, high_levels: Any, level: Any
) -> FormatKernels:
    """The kernels of a format with these levels.

    load: as `load_chunk`, `loads` loads, the low halves first. low_levels, high_levels: (w, k, j) -> the four levels of
    the low halves of word k of a chunk, or of the high ones. level: (words, index) -> a level by its index in the
    matrix, rows one after another.
    """

    @jit(device=True)
    def dot(w, scale, low, row, r, stride, x, at, j):
        s = _scales(scale, low, row, r, stride, j)
        at += 32 * j - 16 * (j & 1)  # 64 columns a pair; so written, chunks 32 apart need no addresses of their own
        first = _add_dot(_add_dot(_NOTHING, low_levels(w, 0, j), x, at), low_levels(w, 1, j), x, at + 4)
        first = _add_dot(_add_dot(first, low_levels(w, 2, j), x, at + 8), low_levels(w, 3, j), x, at + 12)
        at += 32
        then = _add_dot(_add_dot(_NOTHING, high_levels(w, 0, j), x, at), high_levels(w, 1, j), x, at + 4)
        then = _add_dot(_add_dot(then, high_levels(w, 2, j), x, at + 8), high_levels(w, 3, j), x, at + 12)
        return (s[0] * first[0] + s[1] * then[0]) - (s[2] * first[1] + s[3] * then[1])

    @jit(device=True)
    def add(total, h, w, scale, low, row, r, stride, j):
        s = _scales(scale, low, row, r, stride, j)
        first, then, shift, upper = h * s[0], h * s[1], h * s[2], h * s[3]
        return (
            _add_levels(total[0], first, low_levels(w, 0, j), shift),
            _add_levels(total[1], first, low_levels(w, 1, j), shift),
            _add_levels(total[2], first, low_levels(w, 2, j), shift),
            _add_levels(total[3], first, low_levels(w, 3, j), shift),
            _add_levels(total[4], then, high_levels(w, 0, j), upper),
            _add_levels(total[5], then, high_levels(w, 1, j), upper),
            _add_levels(total[6], then, high_levels(w, 2, j), upper),
            _add_levels(total[7], then, high_levels(w, 3, j), upper),
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
        loads=loads,
    )
