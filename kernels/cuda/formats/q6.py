"""q6: a chunk is 16 bytes of low halves, as in q4, and the 16 bytes with the upper bit pairs of all 64 columns.

Two chunks share the pairs. They are neighbours in a warp, whose one load of pairs reads them once: of memory a warp
reads 48 bytes for 64 columns, side by side. A chunk of all 48 bytes would take three loads instead of four, but twice
the registers, and lanes would read activations 256 bytes apart, which are all in the same banks.
"""

from __future__ import annotations

import numpy as np

from svdengine.kernels.cuda.formats.fours import add_four, halves_of_64
from svdengine.kernels.cuda.formats.kernels import FormatKernels
from svdengine.kernels.cuda.intrinsics import as_float, h2f, jit, ldg128, u8x4_less_32

_HALVES, _PAIRS = np.uint32(0x0F0F0F0F), np.uint32(0x30303030)
_FOUR = np.uint32(4)
_ZERO = np.float32(0)


@jit(device=True)
def _load(words, base, j):
    """Words 0 to 3 are the low halves, 4 to 7 the pairs."""
    at = base + 12 * (j >> 1)
    return ldg128(words, at + 4 * (j & 1)) + ldg128(words, at + 8)


@jit(device=True)
def _scales(scale, r, stride, j):
    """The scales of the low halves of chunk j of row r, and of its high ones."""
    return h2f(scale[r * (stride >> 6) + (j >> 1)])


@jit(device=True)
def _four_low(w, k, second):
    """The weights of four low halves, from word k, without their scale. second: 1 of the second chunk of a pair."""
    # Their pairs are the lowest two bits of a byte, or the next two.
    pairs = w[4 + k] << np.uint32(4 - 2 * second)
    return u8x4_less_32((w[k] & _HALVES) | (pairs & _PAIRS))


@jit(device=True)
def _four_high(w, k, second):
    """As `_four_low`, of four high halves. Their pairs are the bits from 4 on, or from 6 on."""
    pairs = w[4 + k] >> np.uint32(2 * second)
    return u8x4_less_32(((w[k] >> _FOUR) & _HALVES) | (pairs & _PAIRS))


@jit(device=True)
def _add_dot(total, values, x, at):
    """total + four values times four activations from item `at`."""
    a = ldg128(x, at)
    total += values[0] * as_float(a[0])
    total += values[1] * as_float(a[1])
    total += values[2] * as_float(a[2])
    return total + values[3] * as_float(a[3])


@jit(device=True)
def _dot(w, scale, low, row, r, stride, x, at, j):
    s, second = _scales(scale, r, stride, j), j & 1
    at += 32 * j - 16 * second  # 64 columns a pair; so written, chunks 32 apart need no addresses of their own
    first = _add_dot(_add_dot(_ZERO, _four_low(w, 0, second), x, at), _four_low(w, 1, second), x, at + 4)
    first = _add_dot(_add_dot(first, _four_low(w, 2, second), x, at + 8), _four_low(w, 3, second), x, at + 12)
    at += 32
    then = _add_dot(_add_dot(_ZERO, _four_high(w, 0, second), x, at), _four_high(w, 1, second), x, at + 4)
    then = _add_dot(_add_dot(then, _four_high(w, 2, second), x, at + 8), _four_high(w, 3, second), x, at + 12)
    return s[0] * first + s[1] * then


@jit(device=True)
def _add(total, h, w, scale, low, row, r, stride, j):
    s, second = _scales(scale, r, stride, j), j & 1
    first, then = h * s[0], h * s[1]
    return (
        add_four(total[0], first, _four_low(w, 0, second)),
        add_four(total[1], first, _four_low(w, 1, second)),
        add_four(total[2], first, _four_low(w, 2, second)),
        add_four(total[3], first, _four_low(w, 3, second)),
        add_four(total[4], then, _four_high(w, 0, second)),
        add_four(total[5], then, _four_high(w, 1, second)),
        add_four(total[6], then, _four_high(w, 2, second)),
        add_four(total[7], then, _four_high(w, 3, second)),
    )


@jit(device=True)
def _weight(words, scale, low, row, r, column, stride):
    # A byte of halves has columns 32 apart, and one of pairs columns 16 apart.
    block = 12 * ((r * stride + column) >> 6)
    half, pair = column & 31, column & 15
    q = (words[block + (half >> 2)] >> (8 * (half & 3) + 4 * (column >> 5 & 1))) & 15
    upper = (words[block + 8 + (pair >> 2)] >> (8 * (pair & 3) + 2 * (column >> 4 & 3))) & 3
    s = h2f(scale[(r * stride + column) >> 6])
    return (s[1] if column & 32 else s[0]) * (np.float32(q + 16 * upper) - np.float32(32))


Q6_KERNELS = FormatKernels(
    name="q6",
    chunk_columns=32,
    load_chunk=_load,
    dot_chunk=_dot,
    add_chunk=_add,
    column_of=halves_of_64,
    weight=_weight,
    most_sums=2,
    loads=2,
    types={"scale": "uint32"},  # both scales of 64 columns
)
