"""f32, f16 and bf16: 16 bytes of a row are 4 or 8 columns, without scales."""

from __future__ import annotations

from typing import Any

import numpy as np

from svdengine.kernels.cuda.formats.fours import add_four, consecutive, dot_four, load_sixteen_bytes
from svdengine.kernels.cuda.formats.kernels import FormatKernels
from svdengine.kernels.cuda.intrinsics import as_float, bf2f, h2f, jit
from svdengine.kernels.formats import WeightFormat


@jit(device=True)
def _floats(w):
    return as_float(w[0]), as_float(w[1]), as_float(w[2]), as_float(w[3])


@jit(device=True)
def _dot_f32(w, scale, low, row, r, stride, x, at, j):
    return dot_four(_floats(w), x, at + 4 * j)


@jit(device=True)
def _add_f32(total, h, w, scale, low, row, r, stride, j):
    return (add_four(total[0], h, _floats(w)),)


@jit(device=True)
def _weight_f32(words, scale, low, row, r, column, stride):
    return as_float(words[r * stride + column])


F32_KERNELS = FormatKernels(
    name="f32",
    chunk_columns=4,
    load_chunk=load_sixteen_bytes,
    dot_chunk=_dot_f32,
    add_chunk=_add_f32,
    column_of=consecutive(4),
    weight=_weight_f32,
    most_sums=4,
    library_type=np.float32,
)


def _of_16_bits(name: WeightFormat, unpack: Any, library_type: Any) -> FormatKernels:
    """The kernels of a format of which `unpack` makes two float32 of a word."""

    @jit(device=True)
    def dot(w, scale, low, row, r, stride, x, at, j):
        first = dot_four(unpack(w[0]) + unpack(w[1]), x, at + 8 * j)
        return first + dot_four(unpack(w[2]) + unpack(w[3]), x, at + 8 * j + 4)

    @jit(device=True)
    def add(total, h, w, scale, low, row, r, stride, j):
        first = add_four(total[0], h, unpack(w[0]) + unpack(w[1]))
        return first, add_four(total[1], h, unpack(w[2]) + unpack(w[3]))

    @jit(device=True)
    def weight(words, scale, low, row, r, column, stride):
        pair = unpack(words[(r * stride + column) >> 1])
        return pair[1] if column & 1 else pair[0]

    return FormatKernels(
        name=name,
        chunk_columns=8,
        load_chunk=load_sixteen_bytes,
        dot_chunk=dot,
        add_chunk=add,
        column_of=consecutive(8),
        weight=weight,
        most_sums=4,
        library_type=library_type,
    )


F16_KERNELS = _of_16_bits("f16", h2f, np.float16)
BF16_KERNELS = _of_16_bits("bf16", bf2f, None)
