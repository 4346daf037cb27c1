"""q4: levels of four bits, of every 64 columns 32 bytes whose halves are columns 32 apart."""

from __future__ import annotations

import numpy as np

from svdengine.kernels.cuda.formats.affine import FOUR, HALVES, affine_kernels, affine_tiles
from svdengine.kernels.cuda.formats.fours import load_sixteen_bytes
from svdengine.kernels.cuda.formats.tiles import load_of
from svdengine.kernels.cuda.intrinsics import jit
from svdengine.kernels.cuda.tensor_cores import load_transposed_matrices

_HIGH_HALVES = np.uint32(0xF0F0F0F0)
_HIGH_PART = 1 / 16
_load_pieces, _load_columns = load_of(2), load_of(2, load_transposed_matrices)


@jit(device=True)
def _low_codes(w, k, j):
    return w[k] & HALVES


@jit(device=True)
def _high_codes(w, k, j):
    return w[k] & _HIGH_HALVES  # 16 times the levels: a shift less


@jit(device=True)
def _level(words, index):
    byte = 32 * (index >> 6) + (index & 31)
    return (words[byte >> 2] >> (8 * (byte & 3) + 4 * (index >> 5 & 1))) & 15


@jit(device=True, forceinline=True)
def _load_tile(shared, at, a, first):
    halves = _load_pieces(shared, at, 0)
    for i in range(4):
        a[first + i], a[first + 4 + i] = halves[i] & HALVES, halves[i] & _HIGH_HALVES


@jit(device=True, forceinline=True)
def _levels(shared, at, u):
    halves = _load_columns(shared, at, 0)
    for i in range(4):
        u[i], u[4 + i] = halves[i] & HALVES, (halves[i] >> FOUR) & HALVES


Q4_KERNELS = affine_kernels(
    "q4",
    load_sixteen_bytes,
    _low_codes,
    _high_codes,
    _level,
    affine_tiles(_load_tile, _levels, _HIGH_PART),
    high_part=_HIGH_PART,
    listed_at_once=2,
)
