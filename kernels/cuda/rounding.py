"""Activations rounded to integers in groups of 32, for integer products (integer_dot.py).

A rounded row of C columns, C a multiple of 64, is held in C words of a float32 buffer's row, so that products read half
or a quarter of what they would in float32:

    C / 2 words   for each 16 columns the 16-bit values' high bytes, signed, then their low bytes, unsigned;
                  or in the first half the 8-bit values
    C / 16 words  for each group of 32 columns its scale, and the sum of its values times that, float32
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numba import cuda

from svdengine.kernels.cuda.device import Array, Device
from svdengine.kernels.cuda.intrinsics import (
    FULL,
    jit,
    kernel,
    to_int,
    warp_max,
    warp_sum_int,
)
from svdengine.kernels.formats import WeightFormat, format_named

ROUND_THREADS = 256
_FINE, _COARSE = np.float32(127 * 256), np.float32(127)
_ZERO, _ONE = np.float32(0), np.float32(1)
_NAN = np.float32(np.nan)


def takes_integers(weight_format: WeightFormat) -> bool:
    """Whether rows of a format are multiplied with rounded activations."""
    return format_named(weight_format).activation_bits == 16


@jit(device=True)
def round_group(value, largest, steps):
    """The integer nearest to value in steps of largest / steps, the scale's float32."""
    scale = largest / steps
    return to_int(value * (_ONE / scale if scale > _ZERO else _ZERO))


@jit(device=True)
def store_fine(value, codes, values, at, padded, column):
    """Round a warp's 32 values, a lane each, to 16 bits; `at`: where the row begins, in words.

    A group with a value that is not finite has a scale that is none either, so that products show it.
    """
    largest = warp_max(abs(value))
    rounded = round_group(value, largest, _FINE)
    total = warp_sum_int(rounded)
    to = 4 * at + 2 * column - (column & 15)
    codes[to] = np.uint8((rounded >> 8) & 255)
    codes[to + 16] = np.uint8(rounded & 255)
    unknown = cuda.any_sync(FULL, value != value)
    if column & 31 == 0:
        step, scales = _NAN if unknown else largest / _FINE, at + (padded >> 1) + (column >> 4)
        values[scales] = step
        values[scales + 1] = step * np.float32(total)


@jit(device=True)
def store_coarse(value, codes, values, at, padded, column):
    """As `store_fine`, to 8 bits."""
    largest = warp_max(abs(value))
    rounded = round_group(value, largest, _COARSE)
    total = warp_sum_int(rounded)
    codes[4 * at + column] = np.uint8(rounded & 255)
    if column & 31 == 0:
        scales = at + (padded >> 1) + (column >> 4)
        values[scales] = largest / _COARSE
        values[scales + 1] = largest / _COARSE * np.float32(total)


@kernel("float32* x, uint8* codes, float32* values, int32 padded, int32 stride")
def round_activations(x, codes, values, padded, stride):
    """Round rows (blockIdx.y) of x to 16 bits. All have rows of `stride` items; a warp has 32 columns."""
    column = cuda.blockIdx.x * ROUND_THREADS + cuda.threadIdx.x
    at = cuda.blockIdx.y * stride
    if column < padded:  # whole warps: padded is a multiple of 32
        store_fine(x[at + column], codes, values, at, padded, column)


def rounded_for(device: Device, formats: Iterable[WeightFormat], x: Array, to: Array, stride: int, n: int) -> Array:
    """`to`, with n rows of x (n, stride) rounded, if a matrix of one of the formats takes them so; or else x.

    stride: a multiple of 64; the columns of the matrices as stored.
    """
    return round_rows_to(device, x, to, stride, n) if any(map(takes_integers, formats)) else x


def round_rows_to(device: Device, x: Array, to: Array, stride: int, n: int) -> Array:
    """`to`, with n rows of x (n, stride) rounded; stride: a multiple of 64, the columns of matrices as stored."""
    grid = (-(-stride // ROUND_THREADS), n)
    device.launch(round_activations, grid, ROUND_THREADS, x, to, to, stride, stride)
    return to
