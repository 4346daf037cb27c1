"""q4: levels of four bits, of every 64 columns 32 bytes whose halves are columns 32 apart."""

from __future__ import annotations

from svdengine.kernels.cuda.formats.affine import FOUR, HALVES, affine_kernels
from svdengine.kernels.cuda.formats.fours import load_sixteen_bytes
from svdengine.kernels.cuda.intrinsics import jit, u8x4


@jit(device=True)
def _low_levels(w, k, j):
    return u8x4(w[k] & HALVES)


@jit(device=True)
def _high_levels(w, k, j):
    return u8x4((w[k] >> FOUR) & HALVES)


@jit(device=True)
def _level(words, index):
    byte = 32 * (index >> 6) + (index & 31)
    return (words[byte >> 2] >> (8 * (byte & 3) + 4 * (index >> 5 & 1))) & 15


Q4_KERNELS = affine_kernels("q4", 1, load_sixteen_bytes, _low_levels, _high_levels, _level)
