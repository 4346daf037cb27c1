"""A matrix row of any format, 16 bytes at a time: its product with an activation row, and adding it to a sum.

A chunk is 16 bytes of a row: 4, 8, 8, 16 or 32 columns. Activations are float32, seen as words. The parts of a matrix
are those of kernels/cuda/model.py: `words`, `scale`, `low` and `row`, of which a format reads what it has.
"""

from __future__ import annotations

import numpy as np

from svdengine.kernels.cuda.intrinsics import as_float, bf2f, h2f, jit, ldg128, s8x4, u8x4
from svdengine.kernels.formats import WeightFormat

CHUNK_COLUMNS: dict[WeightFormat, int] = {"f32": 4, "f16": 8, "bf16": 8, "q8": 16, "q4": 32}
_NIBBLES = np.uint32(0x0F0F0F0F)
_FOUR = np.uint32(4)
_ZERO = np.float32(0)
_ZEROS = (_ZERO, _ZERO, _ZERO, _ZERO)


def matrix_parameters(weight_format: WeightFormat, prefix: str = "") -> str:
    """The parameters of a kernel that are a matrix, for `kernel`."""
    scale = "float16" if weight_format == "q8" else "uint8"
    return f"uint32* {prefix}words, {scale}* {prefix}scale, uint8* {prefix}low, float32* {prefix}row"


def neuron_matrix_parameters(weight_format: WeightFormat, prefix: str = "") -> str:
    """The same of a matrix with a row for each neuron, of which those from `hot` on may lie in host memory, `cold`."""
    return f"{matrix_parameters(weight_format, prefix)}, uint32* {prefix}cold"


def _held_row(split):
    @jit(device=True)
    def held_row(words, cold, hot, r):
        if split and r >= hot:
            return cold, r - hot
        return words, r

    return held_row


# By whether a matrix is split: held_row(words, cold, hot, r), the array that holds the words of row r, and their row.
HELD_ROW = {split: _held_row(split) for split in (False, True)}


@jit(device=True)
def dot_four(values, x, at):
    """Four values times four activations from item `at`."""
    a = ldg128(x, at)
    low = values[0] * as_float(a[0]) + values[1] * as_float(a[1])
    return low + (values[2] * as_float(a[2]) + values[3] * as_float(a[3]))


@jit(device=True)
def sum_four(x, at):
    """The sum of four activations from item `at`."""
    a = ldg128(x, at)
    return (as_float(a[0]) + as_float(a[1])) + (as_float(a[2]) + as_float(a[3]))


@jit(device=True)
def as_floats(w):
    """Four words as four float32."""
    return as_float(w[0]), as_float(w[1]), as_float(w[2]), as_float(w[3])


@jit(device=True)
def chunk_f32(w, scale, low, row, r, stride, x, at, j):
    """Chunk j of row r, whose words are w, times the activation row from item `at`."""
    return dot_four(as_floats(w), x, at + 4 * j)


@jit(device=True)
def chunk_f16(w, scale, low, row, r, stride, x, at, j):
    """As `chunk_f32`."""
    first = dot_four(h2f(w[0]) + h2f(w[1]), x, at + 8 * j)
    return first + dot_four(h2f(w[2]) + h2f(w[3]), x, at + 8 * j + 4)


@jit(device=True)
def chunk_bf16(w, scale, low, row, r, stride, x, at, j):
    """As `chunk_f32`."""
    first = dot_four(bf2f(w[0]) + bf2f(w[1]), x, at + 8 * j)
    return first + dot_four(bf2f(w[2]) + bf2f(w[3]), x, at + 8 * j + 4)


@jit(device=True)
def chunk_q8(w, scale, low, row, r, stride, x, at, j):
    """As `chunk_f32`. Two chunks share a scale."""
    at += 16 * j
    first = dot_four(s8x4(w[0]), x, at) + dot_four(s8x4(w[1]), x, at + 4)
    second = dot_four(s8x4(w[2]), x, at + 8) + dot_four(s8x4(w[3]), x, at + 12)
    return np.float32(scale[r * (stride >> 5) + (j >> 1)]) * (first + second)


@jit(device=True)
def dot_nibbles(w, x, at):
    """The low halves of 16 bytes times 16 activations from item `at`."""
    first = dot_four(u8x4(w[0] & _NIBBLES), x, at) + dot_four(u8x4(w[1] & _NIBBLES), x, at + 4)
    second = dot_four(u8x4(w[2] & _NIBBLES), x, at + 8) + dot_four(u8x4(w[3] & _NIBBLES), x, at + 12)
    return first + second


@jit(device=True)
def upper_nibbles(w):
    """The words with the high half of every byte in its low half."""
    return w[0] >> _FOUR, w[1] >> _FOUR, w[2] >> _FOUR, w[3] >> _FOUR


@jit(device=True)
def q4_scales(scale, low, row, r, stride, j):
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
def chunk_q4(w, scale, low, row, r, stride, x, at, j):
    """As `chunk_f32`. Low halves are 16 columns of a group of 32, high halves those 32 columns on."""
    s = q4_scales(scale, low, row, r, stride, j)
    at += 64 * (j >> 1) + 16 * (j & 1)
    first = s[0] * dot_nibbles(w, x, at) + s[1] * dot_nibbles(upper_nibbles(w), x, at + 32)
    sums = (sum_four(x, at) + sum_four(x, at + 4)) + (sum_four(x, at + 8) + sum_four(x, at + 12))
    at += 32
    upper = (sum_four(x, at) + sum_four(x, at + 4)) + (sum_four(x, at + 8) + sum_four(x, at + 12))
    return first - (s[2] * sums + s[3] * upper)


def _dot(columns, chunk):
    @jit(device=True)
    def dot(words, held, scale, low, row, r, stride, x, at, lane):
        count = stride // columns
        base = held * (4 * count)
        total = _ZERO
        j = lane
        while j + 96 < count:  # four loads are on their way at once
            w0 = ldg128(words, base + 4 * j)
            w1 = ldg128(words, base + 4 * (j + 32))
            w2 = ldg128(words, base + 4 * (j + 64))
            w3 = ldg128(words, base + 4 * (j + 96))
            total += chunk(w0, scale, low, row, r, stride, x, at, j)
            total += chunk(w1, scale, low, row, r, stride, x, at, j + 32)
            total += chunk(w2, scale, low, row, r, stride, x, at, j + 64)
            total += chunk(w3, scale, low, row, r, stride, x, at, j + 96)
            j += 128
        while j < count:
            total += chunk(ldg128(words, base + 4 * j), scale, low, row, r, stride, x, at, j)
            j += 32
        return total

    return dot


# By format: dot(words, held, scale, low, row, r, stride, x, at, lane), one lane's share of row r, whose words are row
# `held` of those, times an activation row.
DOTS = {
    "f32": _dot(4, chunk_f32),
    "f16": _dot(8, chunk_f16),
    "bf16": _dot(8, chunk_bf16),
    "q8": _dot(16, chunk_q8),
    "q4": _dot(32, chunk_q4),
}


@jit(device=True)
def add_four(total, h, values):
    """total + h * values, of four."""
    return (
        total[0] + h * values[0],
        total[1] + h * values[1],
        total[2] + h * values[2],
        total[3] + h * values[3],
    )


@jit(device=True)
def add_four_shifted(total, h, values, shift):
    """total + (h * values - shift), of four."""
    return (
        total[0] + (h * values[0] - shift),
        total[1] + (h * values[1] - shift),
        total[2] + (h * values[2] - shift),
        total[3] + (h * values[3] - shift),
    )


@jit(device=True)
def add_f32(total, h, w, scale, low, row, r, stride, j):
    """total + h times chunk j of row r, whose words are w; sums are kept by fours."""
    return (add_four(total[0], h, as_floats(w)),)


@jit(device=True)
def add_f16(total, h, w, scale, low, row, r, stride, j):
    """As `add_f32`."""
    return add_four(total[0], h, h2f(w[0]) + h2f(w[1])), add_four(total[1], h, h2f(w[2]) + h2f(w[3]))


@jit(device=True)
def add_bf16(total, h, w, scale, low, row, r, stride, j):
    """As `add_f32`."""
    return add_four(total[0], h, bf2f(w[0]) + bf2f(w[1])), add_four(total[1], h, bf2f(w[2]) + bf2f(w[3]))


@jit(device=True)
def add_q8(total, h, w, scale, low, row, r, stride, j):
    """As `add_f32`."""
    h *= np.float32(scale[r * (stride >> 5) + (j >> 1)])
    return (
        add_four(total[0], h, s8x4(w[0])),
        add_four(total[1], h, s8x4(w[1])),
        add_four(total[2], h, s8x4(w[2])),
        add_four(total[3], h, s8x4(w[3])),
    )


@jit(device=True)
def add_nibbles(t0, t1, t2, t3, h, w, shift):
    """Four sums of four + (h * the low halves of 16 bytes - shift)."""
    return (
        add_four_shifted(t0, h, u8x4(w[0] & _NIBBLES), shift),
        add_four_shifted(t1, h, u8x4(w[1] & _NIBBLES), shift),
        add_four_shifted(t2, h, u8x4(w[2] & _NIBBLES), shift),
        add_four_shifted(t3, h, u8x4(w[3] & _NIBBLES), shift),
    )


@jit(device=True)
def add_q4(total, h, w, scale, low, row, r, stride, j):
    """As `add_f32`: first the sums of the low halves, then those of the high ones."""
    s = q4_scales(scale, low, row, r, stride, j)
    first = add_nibbles(total[0], total[1], total[2], total[3], h * s[0], w, h * s[2])
    return first + add_nibbles(total[4], total[5], total[6], total[7], h * s[1], upper_nibbles(w), h * s[3])


ADDS = {"f32": add_f32, "f16": add_f16, "bf16": add_bf16, "q8": add_q8, "q4": add_q4}
NOTHING = {name: (_ZEROS,) * (columns // 4) for name, columns in CHUNK_COLUMNS.items()}  # what sums start from


@jit(device=True)
def consecutive_column(j, k, columns):
    """The first column of the k-th four of chunk j."""
    return columns * j + 4 * k


@jit(device=True)
def split_column(j, k, columns):
    """As `consecutive_column`, for q4: high halves lie 32 columns after low ones."""
    return 64 * (j >> 1) + 16 * (j & 1) + 4 * (k & 3) + 32 * (k >> 2)


COLUMN_OF = {name: split_column if name == "q4" else consecutive_column for name in CHUNK_COLUMNS}
