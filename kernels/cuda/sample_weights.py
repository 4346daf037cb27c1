"""What sampling kernels add up: the weights of tokens, as integers, and keys that order their logits.

A token's weight is exp((logit - largest) / temperature) in steps of 1 / SCALE, so that sums do not depend on the order
of threads. It is computed in float32, since most GPUs have 64 times fewer units for float64; what is lost when the
difference and its quotient are rounded is kept apart, and corrects the exponential (a pair of floats: Dekker, 1971).
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from svdengine.kernels.cuda.intrinsics import FULL, as_float, as_word, jit, lane_index, warp_index

SCALE = 1 << 38  # the weight of the likeliest token
LOWEST = 26.4  # a token this far below the largest, in units of the temperature, weighs nothing: ln(SCALE) and a little
LIMB = 13  # bits of a weight that are added up in one 32-bit word, since shared memory has no fast 64-bit addition
LIMBS = 3
TOKEN_BITS = 20
_MASK = (1 << LIMB) - 1
_LAST_TOKEN = (1 << TOKEN_BITS) - 1
_SCALE = np.float32(SCALE)
_ZERO, _ONE = np.float32(0), np.float32(1)
_SIGN = np.uint32(0x80000000)
_ONES = np.uint32(0xFFFFFFFF)
_INFINITY = np.float32(np.inf)
_LOWEST = np.float32(-LOWEST)


@jit(device=True)
def key_of(logit):
    """An int64 of 32 bits that is larger for a larger logit; equal for zeros of either sign."""
    bits = as_word(logit + _ZERO)
    return np.int64(np.uint32(bits ^ (_ONES if bits & _SIGN else _SIGN)))


@jit(device=True)
def logit_of(key):
    """The logit whose key it is."""
    bits = np.uint32(key)
    return as_float(np.uint32(bits ^ (_SIGN if bits & _SIGN else _ONES)))


@jit(device=True)
def rank_of(logit, token):
    """An int64 that is larger for a larger logit, and of equal ones for the lower token. NaN is above all others."""
    known = logit if logit == logit else _INFINITY
    return (key_of(known) << TOKEN_BITS) | (_LAST_TOKEN - token)


@jit(device=True)
def logit_of_rank(rank):
    """The logit of a rank."""
    return logit_of(rank >> TOKEN_BITS)


@jit(device=True)
def token_of_rank(rank):
    """The token of a rank: int32."""
    return np.int32(_LAST_TOKEN - (rank & _LAST_TOKEN))


@jit(device=True)
def distance_of(logit, largest, inverse):
    """(logit - largest) / temperature as two float32, the second what the first was rounded by. inverse: 1 / it."""
    high = np.float32(inverse)
    low = np.float32(inverse - high)
    d = logit - largest
    b = d - logit
    lost = (logit - (d - b)) - (largest + b)  # of the difference
    quotient = d * high
    return quotient, np.float32(cuda.fma(d, high, -quotient)) + (d * low + lost * high)


@jit(device=True)
def weigh(logit, largest, inverse, floor):
    """A token's weight, int64; 0 for less than `floor`. largest: of all logits; inverse: float64, 1 / temperature."""
    quotient, lost = distance_of(logit, largest, inverse)
    if logit == largest or quotient < _LOWEST:
        return np.int64(SCALE) if logit == largest else np.int64(0)
    share = np.float32(math.exp(quotient))
    weight = np.int64((share + share * lost) * _SCALE)
    return weight if weight >= floor else np.int64(0)


@jit(device=True)
def scan_block(x, parts):
    """The sum of an int64 over the threads of a block before this one, and over all. parts: 32 int64, shared.

    The kernel has the array: Numba cannot link one of a device function that is called by several others.
    """
    lane, warp = lane_index(), warp_index()
    before = x
    for k in range(5):
        other = cuda.shfl_up_sync(FULL, before, 1 << k)
        if lane >= 1 << k:
            before += other
    if lane == 31:
        parts[warp] = before
    cuda.syncthreads()
    before -= x
    total = np.int64(0)
    for w in range(cuda.blockDim.x >> 5):
        if w < warp:
            before += parts[w]
        total += parts[w]
    cuda.syncthreads()  # so that the next sum may write
    return before, total


@jit(device=True)
def largest_in_block(x, parts):
    """The largest int64 of a block, in every thread; parts as in `scan_block`."""
    for k in range(5):
        x = max(x, cuda.shfl_xor_sync(FULL, x, 1 << k))
    if lane_index() == 0:
        parts[warp_index()] = x
    cuda.syncthreads()
    for w in range(cuda.blockDim.x >> 5):
        x = max(x, parts[w])
    cuda.syncthreads()  # so that the next maximum may write
    return x


@jit(device=True)
def add_weight(sums, places, place, weight):
    """Add to the weight on a place of `places`, of which each limb has its own sum in shared memory."""
    for k in range(LIMBS):
        cuda.atomic.add(sums, k * places + place, np.uint32((weight >> (LIMB * k)) & _MASK))


@jit(device=True)
def weight_on(sums, places, place):
    """The weight on a place: int64."""
    weight = np.int64(0)
    for k in range(LIMBS):
        weight += np.int64(sums[k * places + place]) << (LIMB * k)
    return weight


@jit(device=True)
def floor_of(min_p):
    """The least weight that min-p keeps: int64."""
    exact = min_p * SCALE
    least = np.int64(exact)
    return least + np.int64(1) if least < exact else least
