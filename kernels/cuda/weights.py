"""Single weights of a stored matrix (kernels/cuda/model.py), for each format."""

from __future__ import annotations

from typing import Any

import numpy as np

from svdengine.kernels.cuda.intrinsics import as_float, bf2f, h2f, jit
from svdengine.kernels.formats import WeightFormat


@jit(device=True)
def _weight_f32(words, scale, low, row, r, column, stride):
    return as_float(words[r * stride + column])


@jit(device=True)
def _weight_f16(words, scale, low, row, r, column, stride):
    pair = h2f(words[(r * stride + column) >> 1])
    return pair[1] if column & 1 else pair[0]


@jit(device=True)
def _weight_bf16(words, scale, low, row, r, column, stride):
    pair = bf2f(words[(r * stride + column) >> 1])
    return pair[1] if column & 1 else pair[0]


@jit(device=True)
def _weight_q8(words, scale, low, row, r, column, stride):
    # With 128 added to every byte none is negative.
    index = r * stride + column
    word = words[index >> 2] ^ np.uint32(0x80808080)
    return np.float32(scale[index >> 5]) * (np.float32((word >> (8 * (column & 3))) & 255) - np.float32(128))


@jit(device=True)
def _weight_q4(words, scale, low, row, r, column, stride):
    # Byte 32 * block + column % 32 of the row; the second half of a block's columns lies in the high halves.
    byte = (r * stride >> 1) + 32 * (column >> 6) + (column & 31)
    q = np.float32((words[byte >> 2] >> (8 * (byte & 3) + 4 * (column >> 5 & 1))) & 15)
    group = (r * stride + column) >> 5
    return row[2 * r] * np.float32(scale[group]) * q - row[2 * r + 1] * np.float32(low[group])


# (words, scale, low, row, r, column, stride) -> the weight of row r and a column, float32.
WEIGHT: dict[WeightFormat, Any] = {
    "f32": _weight_f32,
    "f16": _weight_f16,
    "bf16": _weight_bf16,
    "q8": _weight_q8,
    "q4": _weight_q4,
}
