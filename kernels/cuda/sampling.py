"""Sampling on the device: temperature, top-k, top-p and min-p as scheduling/sampler.py defines them, or greedily.

No row is sorted. Tokens are ordered by logit, ties by token id, and those that a filter keeps are the first of that
order: all above a key, and some of those on it. Such a key is found digit by digit, from a histogram of the digit over
the tokens whose earlier digits match. What is added up are integers, a token's weight in steps of 1 / SCALE, so that
sums do not depend on the order of threads. One block samples a row; random numbers come from the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numba import cuda
from numba.cuda import types
from numpy.typing import NDArray

from svdengine.kernels.cuda.device import Device
from svdengine.kernels.cuda.intrinsics import FULL, as_float, as_word, block_max, jit, kernel, lane_index, warp_index
from svdengine.kernels.cuda.workspace import CHOICE_NUMBERS, Workspace
from svdengine.kernels.executor import NOT_FINITE, Choice

SAMPLE_THREADS = 512
MOST_TOKENS = 1 << 19  # of a vocabulary: sums of limbs fit in 32 bits
SCALE = 1 << 38  # the weight of the likeliest token
_LIMB = 13  # bits of a weight that are added up in one 32-bit word, since shared memory has no fast 64-bit addition
_LIMBS = 3
_MASK = (1 << _LIMB) - 1
_DIGIT = 11  # bits of a key that are found at once
_SUMS = _LIMBS << _DIGIT
_SIGN = np.uint32(0x80000000)
_ONES = np.uint32(0xFFFFFFFF)
_INFINITY = np.float32(np.inf)
_HIGHEST = 0xFFFFFFFF  # of all keys


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
def key_of(logit):
    """An int64 of 32 bits that is larger for a larger logit; equal for zeros of either sign."""
    bits = as_word(logit + np.float32(0))
    return np.int64(np.uint32(bits ^ (_ONES if bits & _SIGN else _SIGN)))


@jit(device=True)
def logit_of(key):
    """The logit whose key it is."""
    bits = np.uint32(key)
    return as_float(np.uint32(bits ^ (_SIGN if bits & _SIGN else _ONES)))


@jit(device=True)
def largest_logit(logits, at, size):
    """The largest of a row's logits; infinity where one is NaN."""
    largest = -_INFINITY
    for i in range(cuda.threadIdx.x, size, cuda.blockDim.x):
        logit = logits[at + i]
        largest = max(largest, logit if logit == logit else _INFINITY)
    return block_max(largest)


@jit(device=True)
def weigh(logit, largest, temperature, floor):
    """exp((logit - largest) / temperature) in steps of 1 / SCALE; 0 for less than `floor`."""
    weight = np.int64(math.exp((np.float64(logit) - np.float64(largest)) / temperature) * SCALE + 0.5)
    return weight if weight >= floor else np.int64(0)


@jit(device=True)
def weight_from(logits, at, size, parts, largest, temperature, floor, least):
    """The weight of all tokens with the key `least` or a larger one."""
    total = np.int64(0)
    for i in range(cuda.threadIdx.x, size, cuda.blockDim.x):
        logit = logits[at + i]
        if key_of(logit) >= least:
            total += weigh(logit, largest, temperature, floor)
    return scan_block(total, parts)[1]


@jit(device=True)
def add_weight(sums, digit, weight):
    """Add to a digit's weight, of which each limb has its own sum."""
    for k in range(_LIMBS):
        cuda.atomic.add(sums, (k << _DIGIT) + digit, np.uint32((weight >> (_LIMB * k)) & _MASK))


@jit(device=True)
def weight_on(sums, digit):
    """A digit's weight, or with `counting` its number of tokens."""
    weight = np.int64(0)
    for k in range(_LIMBS):
        weight += np.int64(sums[(k << _DIGIT) + digit]) << (_LIMB * k)
    return weight


@jit(device=True)
def add_digits(logits, at, size, sums, largest, temperature, floor, counting, least, key, shift, end):
    """sums, by the digit of bits `shift` to `end`, of tokens from `least` on whose higher bits are those of `key`."""
    for i in range(cuda.threadIdx.x, _LIMBS << _DIGIT, cuda.blockDim.x):
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
                add_weight(sums, digit, weigh(logit, largest, temperature, floor))
    cuda.syncthreads()


@jit(device=True)
def find_digit(sums, parts, found, target):
    """found: the digit at which weights, added up from the highest on, exceed `target`; and the weight above it.

    A target that is not reached is taken as the last one that is.
    """
    share = ((1 << _DIGIT) + cuda.blockDim.x - 1) // cuda.blockDim.x
    first = (1 << _DIGIT) - 1 - cuda.threadIdx.x * share
    last = max(first - share, -1)
    own = np.int64(0)
    for digit in range(first, last, -1):
        own += weight_on(sums, digit)
    above, total = scan_block(own, parts)
    target = min(target, total - 1)
    if above <= target < above + own:
        for digit in range(first, last, -1):
            weight = weight_on(sums, digit)
            if above <= target < above + weight:
                found[0], found[1], found[2] = digit, above, weight
            above += weight
    cuda.syncthreads()


@jit(device=True)
def key_at(logits, at, size, sums, parts, found, largest, temperature, floor, counting, least, target):
    """The key at which weights, added up from the likeliest token on, exceed `target`: key, weight above it, and on it.

    Tokens below the key `least` are left out. With `counting` all tokens weigh 1.
    """
    key = above = weight = np.int64(0)
    end = 32
    while end > 0:
        shift = max(end - _DIGIT, 0)
        add_digits(logits, at, size, sums, largest, temperature, floor, counting, least, key, shift, end)
        find_digit(sums, parts, found, target - above)
        key |= found[0] << shift
        above += found[1]
        weight = found[2]
        cuda.syncthreads()  # so that the next digit may be written
        end = shift
    return key, above, weight


@jit(device=True)
def weigh_between(logit, largest, temperature, floor, counting, least, most):
    """The weight of a token whose key lies in least..most, otherwise 0; with `counting` it is 1."""
    key = key_of(logit)
    if key < least or key > most:
        return np.int64(0)
    return np.int64(1) if counting else weigh(logit, largest, temperature, floor)


@jit(device=True)
def token_at(logits, at, size, parts, found, largest, temperature, floor, counting, least, most, target):
    """The token at which weights of those with a key in least..most, by token id, exceed `target`, which they reach."""
    share = (size + cuda.blockDim.x - 1) // cuda.blockDim.x
    first = min(cuda.threadIdx.x * share, size)
    last = min(first + share, size)
    own = np.int64(0)
    for i in range(first, last):
        own += weigh_between(logits[at + i], largest, temperature, floor, counting, least, most)
    before, _ = scan_block(own, parts)
    if before <= target < before + own:
        for i in range(first, last):
            weight = weigh_between(logits[at + i], largest, temperature, floor, counting, least, most)
            if before <= target < before + weight:
                found[0] = i
            before += weight
    cuda.syncthreads()
    return np.int32(found[0])


@jit(device=True)
def draw_token(logits, at, size, sums, parts, found, largest, temperature, top_k, top_p, min_p, draw):
    """A token of a row, drawn from those that the filters keep."""
    # Kept are all tokens above the key `bound`, and of those on it the first `ties`; together they weigh `total`.
    none = np.int64(0)
    bound, ties, total = none, np.int64(size), none
    limited, ordered = 0 < top_k < size, 0 < top_k < size or top_p < 1
    if limited:
        bound, above, _ = key_at(
            logits, at, size, sums, parts, found, largest, temperature, none, True, none, np.int64(top_k - 1)
        )
        ties = top_k - above
        total = weight_from(logits, at, size, parts, largest, temperature, none, bound + 1)
        total += ties * weigh(logit_of(bound), largest, temperature, none)
    elif top_p < 1:
        total = weight_from(logits, at, size, parts, largest, temperature, none, none)
    if top_p < 1:
        # The token that crosses the line is kept.
        target = min(max(np.int64(math.ceil(top_p * total)), np.int64(1)), total)
        key, above, weight = key_at(
            logits, at, size, sums, parts, found, largest, temperature, none, False, bound, target - 1
        )
        single = weigh(logit_of(key), largest, temperature, none)
        ties = min(ties if key == bound else weight // single, (target - above + single - 1) // single)
        bound, total = key, above + ties * single
    floor = np.int64(math.ceil(min_p * SCALE))
    if not ordered or weigh(logit_of(bound), largest, temperature, floor) == 0:
        total = weight_from(logits, at, size, parts, largest, temperature, floor, bound)

    target = min(np.int64(draw * total), total - 1)
    if not ordered:
        return token_at(
            logits, at, size, parts, found, largest, temperature, floor, False, none, np.int64(_HIGHEST), target
        )
    key, above, weight = key_at(logits, at, size, sums, parts, found, largest, temperature, floor, False, bound, target)
    single = weigh(logit_of(key), largest, temperature, none)
    nth = min((target - above) // single, (ties if key == bound else weight // single) - 1)
    return token_at(logits, at, size, parts, found, largest, temperature, none, True, key, key, nth)


@kernel("float32* logits, float64* numbers, int32* top_ks, int32* tokens, int32 rows, int32 size, int32 stride")
def sample_rows(logits, numbers, top_ks, tokens, rows, size, stride):
    """tokens of logits (rows, stride), of which `size` are the vocabulary's; one block a row (blockIdx.x).

    numbers: (CHOICE_NUMBERS, rows): temperatures, top-p, min-p and random numbers. A row whose temperature is negative
    is left out.
    """
    sums = cuda.shared.array(_SUMS, types.uint32)
    parts = cuda.shared.array(32, types.int64)
    found = cuda.shared.array(3, types.int64)
    row = cuda.blockIdx.x
    at, temperature = row * stride, numbers[row]
    if temperature < 0:
        return
    largest = largest_logit(logits, at, size)
    token = np.int32(NOT_FINITE)
    if abs(largest) < _INFINITY:
        none = np.int64(0)
        if temperature == 0:
            key = key_of(largest)
            token = token_at(logits, at, size, parts, found, largest, temperature, none, True, key, key, none)
        else:
            top_p, min_p, draw = numbers[rows + row], numbers[2 * rows + row], numbers[3 * rows + row]
            token = draw_token(
                logits, at, size, sums, parts, found, largest, temperature, top_ks[row], top_p, min_p, draw
            )
    if cuda.threadIdx.x == 0:
        tokens[row] = token


def pack_choices(choices: Sequence[Choice | None], rows: int) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """Numbers (CHOICE_NUMBERS, rows) and top-k (rows,) of the first rows, as `sample_rows` reads them."""
    numbers, top_k = np.zeros((CHOICE_NUMBERS, rows)), np.zeros(rows, np.int32)
    for row, choice in enumerate(choices):
        if choice is None:
            numbers[0, row] = -1
        else:
            numbers[:, row] = choice.temperature, choice.top_p, choice.min_p, choice.draw
            top_k[row] = choice.top_k
    return numbers, top_k


def sample_tokens(device: Device, work: Workspace, wanted: int, vocab_size: int) -> None:
    """work.chosen of the first `wanted` rows of work.logits, as work.choice_numbers and work.choice_top_k say."""
    sizes = work.sizes
    device.launch(
        sample_rows, (wanted,), SAMPLE_THREADS,
        work.logits, work.choice_numbers, work.choice_top_k, work.chosen, sizes.rows, vocab_size, sizes.logits,
    )  # fmt: skip
