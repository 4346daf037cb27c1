"""q6: as q4 with levels of six bits, whose upper two lie in 16 bytes behind the 32 of low halves.

A chunk has 16 bytes of low halves and the 16 with the bit pairs of all 64 columns. Two chunks share the pairs. They are
neighbours in a warp, whose one load of pairs reads them once: of memory a warp reads 48 bytes for 64 columns, side by
side. A chunk of all 48 bytes would take three loads instead of four, but twice the registers, and lanes would read
activations 256 bytes apart, which are all in the same banks.
"""

from __future__ import annotations

import numpy as np

from svdengine.kernels.cuda.formats.affine import FOUR, HALVES, affine_kernels, affine_tiles
from svdengine.kernels.cuda.formats.tiles import load_of, load_piece_of
from svdengine.kernels.cuda.intrinsics import jit, ldg128_once
from svdengine.kernels.cuda.tensor_cores import load_transposed_matrices

_PAIRS = np.uint32(0x30303030)
_TWO = np.uint32(2)
_load_halves, _load_pairs = load_of(3), load_piece_of(3)
_load_columns, _load_pair_columns = load_of(3, load_transposed_matrices), load_piece_of(3, load_transposed_matrices)


@jit(device=True)
def _load(words, base, j):
    """Words 0 to 3 are the low halves, 4 to 7 the pairs."""
    at = base + 12 * (j >> 1)
    return ldg128_once(words, at + 4 * (j & 1)) + ldg128_once(words, at + 8)


@jit(device=True)
def _low_codes(w, k, j):
    # Their pairs are the lowest two bits of a byte, or in the second chunk of a pair the next two.
    pairs = w[4 + k] << np.uint32(4 - 2 * (j & 1))
    return (w[k] & HALVES) | (pairs & _PAIRS)


@jit(device=True)
def _high_codes(w, k, j):
    # Their pairs are the bits from 4 on, or from 6 on.
    pairs = w[4 + k] >> np.uint32(2 * (j & 1))
    return ((w[k] >> FOUR) & HALVES) | (pairs & _PAIRS)


@jit(device=True)
def _level(words, index):
    # A byte of halves has columns 32 apart, and one of pairs columns 16 apart.
    block, half, pair = 12 * (index >> 6), index & 31, index & 15
    low = (words[block + (half >> 2)] >> (8 * (half & 3) + 4 * (index >> 5 & 1))) & 15
    upper = (words[block + 8 + (pair >> 2)] >> (8 * (pair & 3) + 2 * (index >> 4 & 3))) & 3
    return low + 16 * upper


@jit(device=True, forceinline=True)
def _join(halves, pairs, a, first):
    """Levels of 16 bytes of halves, then the next 16, each of two rows; both rows' pairs."""
    for i in range(2):
        p = pairs[i]
        a[first + i] = (halves[i] & HALVES) | ((p << FOUR) & _PAIRS)
        a[first + i + 2] = (halves[i + 2] & HALVES) | ((p << _TWO) & _PAIRS)
        a[first + i + 4] = ((halves[i] >> FOUR) & HALVES) | (p & _PAIRS)
        a[first + i + 6] = ((halves[i + 2] >> FOUR) & HALVES) | ((p >> _TWO) & _PAIRS)


@jit(device=True, forceinline=True)
def _load_tile(shared, at, a, first):
    _join(_load_halves(shared, at, 0), _load_pairs(shared, at, 2), a, first)


@jit(device=True, forceinline=True)
def _levels(shared, at, u):
    _join(_load_columns(shared, at, 0), _load_pair_columns(shared, at, 2), u, 0)


Q6_KERNELS = affine_kernels(
    "q6", _load, _low_codes, _high_codes, _level, affine_tiles(_load_tile, _levels), at_once=2, listed_at_once=2
)
