"""ternary: levels of two bits, of every 64 columns 16 bytes, each with columns 16 apart.

Two chunks share these bytes, as they share the upper pairs of q6: the first has columns 0 to 15 and 32 to 47.
"""

from __future__ import annotations

import numpy as np

from svdengine.kernels.cuda.formats.affine import affine_kernels, affine_tiles
from svdengine.kernels.cuda.formats.tiles import load_piece_of
from svdengine.kernels.cuda.intrinsics import jit, ldg128_once
from svdengine.kernels.cuda.tensor_cores import load_transposed_matrices

_PAIRS = np.uint32(0x03030303)
_load_pairs_of_rows, _load_columns = load_piece_of(1), load_piece_of(1, load_transposed_matrices)


@jit(device=True)
def _load(words, base, j):
    return ldg128_once(words, base + 4 * (j >> 1))


@jit(device=True)
def _low_codes(w, k, j):
    # The lowest two bits of a byte, or in the second chunk of a pair the next two.
    return (w[k] >> np.uint32(2 * (j & 1))) & _PAIRS


@jit(device=True)
def _high_codes(w, k, j):
    # The bits from 4 on, or from 6 on.
    return (w[k] >> np.uint32(4 + 2 * (j & 1))) & _PAIRS


@jit(device=True)
def _level(words, index):
    block, byte = 4 * (index >> 6), index & 15
    return (words[block + (byte >> 2)] >> (8 * (byte & 3) + 2 * (index >> 4 & 3))) & 3


@jit(device=True, forceinline=True)
def _part(pairs, a, first):
    """Levels of four times 16 columns, each of two rows."""
    for i in range(2):
        for k in range(4):
            a[first + i + 2 * k] = (pairs[i] >> np.uint32(2 * k)) & _PAIRS


@jit(device=True, forceinline=True)
def _load_tile(shared, at, a, first):
    _part(_load_pairs_of_rows(shared, at, 0), a, first)


@jit(device=True, forceinline=True)
def _levels(shared, at, u):
    _part(_load_columns(shared, at, 0), u, 0)


TERNARY_KERNELS = affine_kernels("ternary", _load, _low_codes, _high_codes, _level, affine_tiles(_load_tile, _levels))
