"""q8: 16 bytes of a row are 16 columns; two chunks share a scale."""

from __future__ import annotations

import numpy as np

from svdengine.kernels.cuda.byte_pairs import signed_levels
from svdengine.kernels.cuda.formats.fours import add_four, consecutive, load_sixteen_bytes
from svdengine.kernels.cuda.formats.kernels import FormatKernels
from svdengine.kernels.cuda.formats.tiles import TileKernels, integer_product, load_of
from svdengine.kernels.cuda.integer_dot import dot_16
from svdengine.kernels.cuda.intrinsics import as_float, jit, s8x4
from svdengine.kernels.cuda.tensor_cores import load_transposed_matrices, mma_ss, mma_su

_load_pieces, _load_columns = load_of(4), load_of(4, load_transposed_matrices)
_ZERO, _ONE = np.float32(0), np.float32(1)


@jit(device=True)
def _dot(w, scale, low, row, r, stride, x, at, j):
    product = np.float32(dot_16(w, x, at + 8 * j))
    step = as_float(x[at + (stride >> 1) + (j - (j & 1))])
    return product * (step * np.float32(scale[r * (stride >> 5) + (j >> 1)]))


@jit(device=True)
def _add(total, h, w, scale, low, row, r, stride, j):
    h *= np.float32(scale[r * (stride >> 5) + (j >> 1)])
    return (
        add_four(total[0], h, s8x4(w[0])),
        add_four(total[1], h, s8x4(w[1])),
        add_four(total[2], h, s8x4(w[2])),
        add_four(total[3], h, s8x4(w[3])),
    )


@jit(device=True)
def _weight(words, scale, low, row, r, column, stride):
    # With 128 added to every byte none is negative.
    index = r * stride + column
    word = words[index >> 2] ^ np.uint32(0x80808080)
    return np.float32(scale[index >> 5]) * (np.float32((word >> (8 * (column & 3))) & 255) - np.float32(128))


@jit(device=True, forceinline=True)
def _load_tile(shared, at, a, first):
    below, above = _load_pieces(shared, at, 0), _load_pieces(shared, at, 2)
    for i in range(4):
        a[first + i], a[first + 4 + i] = below[i], above[i]


@jit(device=True, forceinline=True)
def _levels(shared, at, u):
    below, above = _load_columns(shared, at, 0), _load_columns(shared, at, 2)
    for i in range(4):
        u[i], u[4 + i] = below[i], above[i]


@jit(device=True)
def _units(row, r):
    return _ONE, _ONE


@jit(device=True)
def _scales(scale, low, units, at):
    return np.float32(scale[at]), _ZERO, np.float32(scale[at + 1]), _ZERO


Q8_KERNELS = FormatKernels(
    name="q8",
    chunk_columns=16,
    load_chunk=load_sixteen_bytes,
    dot_chunk=_dot,
    add_chunk=_add,
    column_of=consecutive(16),
    weight=_weight,
    most_sums=4,
    types={"scale": "float16"},
    tiles=TileKernels(
        row_tiles=2,
        items=8,
        load=_load_tile,
        product=integer_product(mma_ss, mma_su),
        units=_units,
        scales=_scales,
        levels=_levels,
        as_numbers=signed_levels,
    ),
)
