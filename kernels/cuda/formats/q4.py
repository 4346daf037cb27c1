"""q4: 16 bytes of a row are 16 columns of a group of 32 in their low halves, and those 32 on in their high ones."""

from __future__ import annotations

import numpy as np

from svdengine.kernels.cuda.formats.fours import dot_four, halves_of_64, load_sixteen_bytes
from svdengine.kernels.cuda.formats.kernels import FormatKernels
from svdengine.kernels.cuda.intrinsics import as_float, jit, ldg128, u8x4

_NIBBLES = np.uint32(0x0F0F0F0F)
_FOUR = np.uint32(4)


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
def _upper(w):
    """The words with the high half of every byte in its low half."""
    return w[0] >> _FOUR, w[1] >> _FOUR, w[2] >> _FOUR, w[3] >> _FOUR


@jit(device=True)
def _dot_nibbles(w, x, at):
    """The low halves of 16 bytes times 16 activations from item `at`."""
    first = dot_four(u8x4(w[0] & _NIBBLES), x, at) + dot_four(u8x4(w[1] & _NIBBLES), x, at + 4)
    second = dot_four(u8x4(w[2] & _NIBBLES), x, at + 8) + dot_four(u8x4(w[3] & _NIBBLES), x, at + 12)
    return first + second


@jit(device=True)
def _sum_four(x, at):
    """The sum of four activations from item `at`."""
    a = ldg128(x, at)
    return (as_float(a[0]) + as_float(a[1])) + (as_float(a[2]) + as_float(a[3]))


@jit(device=True)
def _dot(w, scale, low, row, r, stride, x, at, j):
    s = _scales(scale, low, row, r, stride, j)
    at += 64 * (j >> 1) + 16 * (j & 1)
    first = s[0] * _dot_nibbles(w, x, at) + s[1] * _dot_nibbles(_upper(w), x, at + 32)
    sums = (_sum_four(x, at) + _sum_four(x, at + 4)) + (_sum_four(x, at + 8) + _sum_four(x, at + 12))
    at += 32
    upper = (_sum_four(x, at) + _sum_four(x, at + 4)) + (_sum_four(x, at + 8) + _sum_four(x, at + 12))
    return first - (s[2] * sums + s[3] * upper)


@jit(device=True)
def _add_four_shifted(total, h, values, shift):
    """total + (h * values - shift), of four."""
    return (
        total[0] + (h * values[0] - shift),
        total[1] + (h * values[1] - shift),
        total[2] + (h * values[2] - shift),
        total[3] + (h * values[3] - shift),
    )


@jit(device=True)
def _add_nibbles(t0, t1, t2, t3, h, w, shift):
    """Four sums of four + (h * the low halves of 16 bytes - shift)."""
    return (
        _add_four_shifted(t0, h, u8x4(w[0] & _NIBBLES), shift),
        _add_four_shifted(t1, h, u8x4(w[1] & _NIBBLES), shift),
        _add_four_shifted(t2, h, u8x4(w[2] & _NIBBLES), shift),
        _add_four_shifted(t3, h, u8x4(w[3] & _NIBBLES), shift),
    )


@jit(device=True)
def _add(total, h, w, scale, low, row, r, stride, j):
    s = _scales(scale, low, row, r, stride, j)
    first = _add_nibbles(total[0], total[1], total[2], total[3], h * s[0], w, h * s[2])
    return first + _add_nibbles(total[4], total[5], total[6], total[7], h * s[1], _upper(w), h * s[3])


@jit(device=True)
def _weight(words, scale, low, row, r, column, stride):
    # Byte 32 * block + column % 32 of the row; the second half of a block's columns lies in the high halves.
    byte = (r * stride >> 1) + 32 * (column >> 6) + (column & 31)
    q = np.float32((words[byte >> 2] >> (8 * (byte & 3) + 4 * (column >> 5 & 1))) & 15)
    group = (r * stride + column) >> 5
    return row[2 * r] * np.float32(scale[group]) * q - row[2 * r + 1] * np.float32(low[group])


Q4_KERNELS = FormatKernels(
    name="q4",
    chunk_columns=32,
    load_chunk=load_sixteen_bytes,
    dot_chunk=_dot,
    add_chunk=_add,
    column_of=halves_of_64,
    weight=_weight,
    most_sums=2,
)
