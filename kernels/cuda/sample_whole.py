"""A token of a row by one block that reads all of its logits, several times: for rows with too many candidates.

No row is sorted. Tokens are ordered by logit, ties by token id, and those that a filter keeps are the first of that
order: all above a key, and some of those on it. Such a key is found digit by digit, from a histogram of the digit over
the tokens whose earlier digits match.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from svdengine.kernels.cuda.intrinsics import jit
from svdengine.kernels.cuda.sample_weights import (
    LIMBS,
    add_weight,
    floor_of,
    key_of,
    logit_of,
    scan_block,
    weigh,
    weight_on,
)

DIGIT = 11  # bits of a key that are found at once
SUMS = LIMBS << DIGIT  # words of a histogram: a kernel has it in shared memory


@jit(device=True)
def weight_from(logits, at, size, parts, largest, inverse, floor, least):
    """The weight of all tokens with the key `least` or a larger one."""
    total = np.int64(0)
    for i in range(cuda.threadIdx.x, size, cuda.blockDim.x):
        logit = logits[at + i]
        if key_of(logit) >= least:
            total += weigh(logit, largest, inverse, floor)
    return scan_block(total, parts)[1]


@jit(device=True)
def add_digits(logits, at, size, sums, largest, inverse, floor, counting, least, key, shift, end):
    """sums, by the digit of bits `shift` to `end`, of tokens from `least` on whose higher bits are those of `key`."""
    for i in range(cuda.threadIdx.x, LIMBS << DIGIT, cuda.blockDim.x):
        sums[i] = np.uint32(0)
    cuda.syncthreads()
    for i in range(cuda.threadIdx.x, size, cuda.blockDim.x):
        logit = logits[at + i]
        own = key_of(logit)
        if own >= least and own >> end == key >> end:
            digit = (own >> shift) & ((1 << (end - shift)) - 1)
            if counting:
                cuda.atomic.add(sums, digit, np.uint32(1))
            else:
                add_weight(sums, 1 << DIGIT, digit, weigh(logit, largest, inverse, floor))
    cuda.syncthreads()


@jit(device=True)
def find_digit(sums, parts, found, target):
    """found: the digit at which weights, added up from the highest on, exceed `target`; and the weight above it.

    A target that is not reached is taken as the last one that is.
    """
    share = ((1 << DIGIT) + cuda.blockDim.x - 1) // cuda.blockDim.x
    first = (1 << DIGIT) - 1 - cuda.threadIdx.x * share
    last = max(first - share, -1)
    own = np.int64(0)
    for digit in range(first, last, -1):
        own += weight_on(sums, 1 << DIGIT, digit)
    above, total = scan_block(own, parts)
    target = min(target, total - 1)
    if above <= target < above + own:
        for digit in range(first, last, -1):
            weight = weight_on(sums, 1 << DIGIT, digit)
            if above <= target < above + weight:
                found[0], found[1], found[2] = digit, above, weight
            above += weight
    cuda.syncthreads()


@jit(device=True)
def key_at(logits, at, size, sums, parts, found, largest, inverse, floor, counting, least, target):
    """The key at which weights, added up from the likeliest token on, exceed `target`: key, weight above it, and on it.

    Tokens below the key `least` are left out. With `counting` all tokens weigh 1.
    """
    key = above = weight = np.int64(0)
    end = 32
    while end > 0:
        shift = max(end - DIGIT, 0)
        add_digits(logits, at, size, sums, largest, inverse, floor, counting, least, key, shift, end)
        find_digit(sums, parts, found, target - above)
        key |= found[0] << shift
        above += found[1]
        weight = found[2]
        cuda.syncthreads()  # so that the next digit may be written
        end = shift
    return key, above, weight


@jit(device=True)
def weigh_between(logit, largest, inverse, floor, counting, least, most):
    """The weight of a token whose key lies in least..most, otherwise 0; with `counting` it is 1."""
    key = key_of(logit)
    if key < least or key > most:
        return np.int64(0)
    return np.int64(1) if counting else weigh(logit, largest, inverse, floor)


@jit(device=True)
def token_at(logits, at, size, parts, found, largest, inverse, floor, counting, least, most, target):
    """The token at which weights of those with a key in least..most, by token id, exceed `target`, which they reach."""
    share = (size + cuda.blockDim.x - 1) // cuda.blockDim.x
    first = min(cuda.threadIdx.x * share, size)
    last = min(first + share, size)
    own = np.int64(0)
    for i in range(first, last):
        own += weigh_between(logits[at + i], largest, inverse, floor, counting, least, most)
    before, _ = scan_block(own, parts)
    if before <= target < before + own:
        for i in range(first, last):
            weight = weigh_between(logits[at + i], largest, inverse, floor, counting, least, most)
            if before <= target < before + weight:
                found[0] = i
            before += weight
    cuda.syncthreads()
    return np.int32(found[0])


@jit(device=True)
def draw_token(logits, at, size, sums, parts, found, largest, inverse, top_k, top_p, min_p, draw):
    """A token of a row, drawn from those that top-k or top-p, and min-p, keep."""
    # Kept are all tokens above the key `bound`, and of those on it the first `ties`; together they weigh `total`.
    none = np.int64(0)
    bound, ties, total = none, np.int64(size), none
    limited = 0 < top_k < size
    if limited:
        bound, above, _ = key_at(
            logits, at, size, sums, parts, found, largest, inverse, none, True, none, np.int64(top_k - 1)
        )
        ties = top_k - above
        total = weight_from(logits, at, size, parts, largest, inverse, none, bound + 1)
        total += ties * weigh(logit_of(bound), largest, inverse, none)
    else:
        total = weight_from(logits, at, size, parts, largest, inverse, none, none)
    if top_p < 1:
        # The token that crosses the line is kept.
        target = min(max(np.int64(math.ceil(top_p * total)), np.int64(1)), total)
        key, above, weight = key_at(
            logits, at, size, sums, parts, found, largest, inverse, none, False, bound, target - 1
        )
        single = weigh(logit_of(key), largest, inverse, none)
        ties = min(ties if key == bound else weight // single, (target - above + single - 1) // single)
        bound, total = key, above + ties * single
    floor = floor_of(min_p)
    if weigh(logit_of(bound), largest, inverse, floor) == 0:
        total = weight_from(logits, at, size, parts, largest, inverse, floor, bound)

    target = min(np.int64(draw * total), total - 1)
    key, above, weight = key_at(logits, at, size, sums, parts, found, largest, inverse, floor, False, bound, target)
    single = weigh(logit_of(key), largest, inverse, none)
    nth = min((target - above) // single, (ties if key == bound else weight // single) - 1)
    return token_at(logits, at, size, parts, found, largest, inverse, none, True, key, key, nth)
