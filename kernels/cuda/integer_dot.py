"""Integer products of weights of 8 bits with rounded activations (kernels/cuda/rounding.py says how they lie).

Four products of bytes are one instruction (dp4a). Weights take 16 bits of activations, in two of them, as on the CPU: 8
bits would cost up to 1 % of perplexity (docs/tried.md).
"""

from __future__ import annotations

import numpy as np

from svdengine.kernels.cuda.intrinsics import dp4a, dp4a_su, dp4a_us, dp4a_uu, jit, ldg128

_NONE = np.int32(0)


@jit(device=True)
def dot_bytes(w, x, at, total):
    """total + 16 int8 weights times the 8-bit values in four words from `at`."""
    a = ldg128(x, at)
    total = dp4a(w[0], a[0], total)
    total = dp4a(w[1], a[1], total)
    total = dp4a(w[2], a[2], total)
    return dp4a(w[3], a[3], total)


@jit(device=True)
def dot_low_bytes(w, x, at, total):
    """As `dot_bytes`, for unsigned values."""
    a = ldg128(x, at)
    total = dp4a_su(w[0], a[0], total)
    total = dp4a_su(w[1], a[1], total)
    total = dp4a_su(w[2], a[2], total)
    return dp4a_su(w[3], a[3], total)


@jit(device=True)
def dot_16(w, x, at):
    """16 int8 weights times the 16-bit values in eight words from `at`."""
    return dot_low_bytes(w, x, at + 4, np.int32(dot_bytes(w, x, at, _NONE) << 8))


@jit(device=True)
def dot_unsigned_16(w, x, at):
    """As `dot_16`, of uint8 weights."""
    high, low = ldg128(x, at), ldg128(x, at + 4)
    total = dp4a_us(w[0], high[0], _NONE)
    total = dp4a_us(w[1], high[1], total)
    total = dp4a_us(w[2], high[2], total)
    total = np.int32(dp4a_us(w[3], high[3], total) << 8)
    total = dp4a_uu(w[0], low[0], total)
    total = dp4a_uu(w[1], low[1], total)
    total = dp4a_uu(w[2], low[2], total)
    return dp4a_uu(w[3], low[3], total)
