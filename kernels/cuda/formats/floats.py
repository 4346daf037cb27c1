"""f32, f16 and bf16: 16 bytes of a row are 4 or 8 columns, without scales."""

from __future__ import annotations

from typing import Any

import numpy as np

from svdengine.kernels.cuda.byte_pairs import HALF_UNIT, bfloat_pair, high_halves, low_halves
from svdengine.kernels.cuda.formats.fours import NO_SUMS, add_four, consecutive, dot_four, load_sixteen_bytes
from svdengine.kernels.cuda.formats.kernels import FormatKernels
from svdengine.kernels.cuda.formats.tiles import TileKernels
from svdengine.kernels.cuda.intrinsics import as_float, bf2f, h2f, jit, lane_index, s8x4, u8x4
from svdengine.kernels.cuda.tensor_cores import load_two, mma_bf16, mma_f16
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


_PADDING = 8  # words: four rows' 8 bytes are in different banks
_PITCH = 32 + _PADDING
_ZERO, _HIGH = np.float32(0), np.float32(256)


@jit(device=True, forceinline=True)
def _load_tile(shared, at, a, first):
    """Of each group, of 16 columns and then the next 16, the lane's four columns of a row, and of the row 8 below."""
    lane = lane_index()
    place = at + (lane >> 2) * _PITCH + 2 * (lane & 3)
    for k in range(4):
        upper, lower = load_two(shared, place + 8 * k), load_two(shared, place + 8 * _PITCH + 8 * k)
        for i in range(2):
            a[first + 4 * k + i], a[first + 4 * k + 2 + i] = upper[i], lower[i]


def _pair_product(mma: Any) -> Any:
    """multiply(a, first, low, high, c): c + two pairs of columns of 16 and of the next 16, times low and high."""

    @jit(device=True, forceinline=True)
    def multiply(a, first, low, high, c):
        for i in range(2):
            c = mma(
                a[first + i], a[first + 2 + i], a[first + 4 + i], a[first + 6 + i], low[i], high[i],
                c[0], c[1], c[2], c[3],
            )  # fmt: skip
        return c

    return multiply


_multiply_f16, _multiply_bf16 = _pair_product(mma_f16), _pair_product(mma_bf16)


@jit(device=True, forceinline=True)
def _product_f16(a, first, group, b):
    at = first + 8 * group
    c = _multiply_f16(a, at, high_halves(b[0]), high_halves(b[1]), NO_SUMS)
    return _multiply_f16(a, at, low_halves(b[2]), low_halves(b[3]), c)


@jit(device=True)
def _no_units(row, r):
    return _ZERO, _ZERO


@jit(device=True)
def _no_scales(scale, low, units, at):
    return NO_SUMS


@jit(device=True)
def _bfloats(values):
    return bfloat_pair(values[0], values[1]), bfloat_pair(values[2], values[3])


@jit(device=True, forceinline=True)
def _product_bf16(a, first, group, b):
    at = first + 8 * group
    c = _multiply_bf16(a, at, _bfloats(s8x4(b[0])), _bfloats(s8x4(b[1])), NO_SUMS)
    c = _HIGH * c[0], _HIGH * c[1], _HIGH * c[2], _HIGH * c[3]
    return _multiply_bf16(a, at, _bfloats(u8x4(b[2])), _bfloats(u8x4(b[3])), c)


def _of_16_bits(name: WeightFormat, unpack: Any, library_type: Any, tile_product: Any, unit: float) -> FormatKernels:
    """The kernels of a format of which `unpack` makes two float32 of a word; unit: see `TileKernels`."""

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
        tiles=TileKernels(
            row_tiles=1,
            padding=_PADDING,
            items=16,
            load=_load_tile,
            product=tile_product,
            scaled=False,
            units=_no_units,
            scales=_no_scales,
            unit=unit,
        ),
    )


F16_KERNELS = _of_16_bits("f16", h2f, np.float16, _product_f16, HALF_UNIT)
BF16_KERNELS = _of_16_bits("bf16", bf2f, None, _product_bf16, 1.0)
