"""Sampling on the device: temperature, top-k, top-p and min-p as engine/sampling.py defines them, or greedily.

No row is sorted. The tokens that a filter keeps are the first of the order by logit, ties by token id: all above a
bound, and some of those on it. A bound is found bit by bit, from counts or sums of weights over the vocabulary, which
are added in float64 in an order that is always the same. One block samples a row; random numbers come from the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numba import cuda
from numba.cuda import types
from numpy.typing import NDArray

from svdengine.kernels.cuda.device import Array, Device
from svdengine.kernels.cuda.intrinsics import FULL, as_word, jit, kernel, lane_index, warp_index

SAMPLE_THREADS = 1024
NOT_FINITE = -1  # instead of a token, where a logit is NaN or the largest is infinite
_SIGN = np.uint32(0x80000000)
_ONES = np.uint32(0xFFFFFFFF)
_INFINITY = np.float64(np.inf)
_NOTHING = np.float64(0)
_FLOAT_INFINITY = np.float32(np.inf)


@jit(device=True)
def sum_over_block(x, parts):
    """The sum of a float64 over a block of whole warps, the same bits in every thread. parts: 32 float64, shared.

    The kernel has the array: Numba cannot link one of a device function that is called by several others.
    """
    lane = lane_index()
    for k in range(5):
        x += cuda.shfl_xor_sync(FULL, x, 16 >> k)
    if lane == 0:
        parts[warp_index()] = x
    cuda.syncthreads()
    x = parts[lane] if lane < cuda.blockDim.x >> 5 else _NOTHING
    for k in range(5):
        x += cuda.shfl_xor_sync(FULL, x, 16 >> k)
    cuda.syncthreads()  # so that the next sum may write
    return x


@jit(device=True)
def least_of_block(x, parts):
    """The smallest float64 of a block of whole warps, in every thread. parts: 32 float64, shared."""
    lane = lane_index()
    for k in range(5):
        x = min(x, cuda.shfl_xor_sync(FULL, x, 16 >> k))
    if lane == 0:
        parts[warp_index()] = x
    cuda.syncthreads()
    x = parts[lane] if lane < cuda.blockDim.x >> 5 else _INFINITY
    for k in range(5):
        x = min(x, cuda.shfl_xor_sync(FULL, x, 16 >> k))
    cuda.syncthreads()
    return x


@jit(device=True)
def key_of(logit):
    """A uint32 that is larger for a larger logit; equal for zeros of either sign."""
    bits = as_word(logit + np.float32(0))
    return bits ^ (_ONES if bits & _SIGN else _SIGN)


@jit(device=True)
def largest_logit(logits, at, size, parts):
    """The largest of a row's logits; infinity where one is NaN."""
    least = _INFINITY
    for i in range(cuda.threadIdx.x, size, cuda.blockDim.x):
        logit = logits[at + i]
        least = min(least, -np.float64(logit if logit == logit else _FLOAT_INFINITY))
    return -least_of_block(least, parts)


@jit(device=True)
def first_with(logits, at, size, parts, key):
    """The first token whose key it is."""
    first = _INFINITY
    for i in range(cuda.threadIdx.x, size, cuda.blockDim.x):
        if key_of(logits[at + i]) == key:
            first = min(first, np.float64(i))
    return np.int32(least_of_block(first, parts))


@jit(device=True)
def count_from(logits, at, size, parts, key):
    """How many tokens have this key or a larger one."""
    count = _NOTHING
    for i in range(cuda.threadIdx.x, size, cuda.blockDim.x):
        if key_of(logits[at + i]) >= key:
            count += 1
    return sum_over_block(count, parts)


@jit(device=True)
def next_key(key):
    """The key above it; that of a finite logit is never the last."""
    return np.uint32(key + np.uint32(1))


@jit(device=True)
def count_on(logits, at, size, parts, key):
    """How many tokens have this key: int32."""
    return np.int32(count_from(logits, at, size, parts, key) - count_from(logits, at, size, parts, next_key(key)))


@jit(device=True)
def weight_from(logits, weights, at, size, parts, key):
    """The weight of all tokens with this key or a larger one."""
    total = _NOTHING
    for i in range(cuda.threadIdx.x, size, cuda.blockDim.x):
        if key_of(logits[at + i]) >= key:
            total += weights[at + i]
    return sum_over_block(total, parts)


@jit(device=True)
def key_at_rank(logits, at, size, parts, rank, most):
    """The key of the token that comes `rank`-th by logit, from 1; `most`: the largest key."""
    key = np.uint32(0)
    for bit in range(31, -1, -1):
        larger = np.uint32(key | np.uint32(np.uint32(1) << np.uint32(bit)))
        if larger <= most and count_from(logits, at, size, parts, larger) >= rank:
            key = larger
    return key


@jit(device=True)
def key_at_weight(logits, weights, at, size, parts, target, strict, least, most):
    """The largest key from which on tokens weigh at least `target`, or more than it if `strict`; not below `least`."""
    key = np.uint32(0)
    for bit in range(31, -1, -1):
        larger = np.uint32(key | np.uint32(np.uint32(1) << np.uint32(bit)))
        if larger <= least:
            key = larger
        elif larger <= most:
            weight = weight_from(logits, weights, at, size, parts, larger)
            if weight > target or (weight == target and not strict):
                key = larger
    return max(key, least)


@jit(device=True)
def weigh(logits, weights, at, size, parts, largest, temperature):
    """weights = exp((logit - largest) / temperature), and their sum."""
    total = _NOTHING
    for i in range(cuda.threadIdx.x, size, cuda.blockDim.x):
        weight = math.exp(np.float64(logits[at + i]) / temperature - largest / temperature)
        weights[at + i] = weight
        total += weight
    # What waits for the sum also makes all weights visible to all threads.
    return sum_over_block(total, parts)


@jit(device=True)
def least_likely(logits, weights, at, size, parts, bound, min_p):
    """The smallest key from `bound` on of a token that weighs at least min_p, where the largest weighs 1."""
    least = _INFINITY
    for i in range(cuda.threadIdx.x, size, cuda.blockDim.x):
        key = key_of(logits[at + i])
        if key >= bound and weights[at + i] >= min_p:
            least = min(least, np.float64(key))
    return np.uint32(least_of_block(least, parts))


@jit(device=True)
def next_with(logits, at, size, parts, key, token):
    """The first token after `token` whose key it is."""
    after = _INFINITY
    for i in range(token + 1 + cuda.threadIdx.x, size, cuda.blockDim.x):
        if key_of(logits[at + i]) == key:
            after = min(after, np.float64(i))
    return np.int32(least_of_block(after, parts))


@jit(device=True)
def nth_with(logits, at, size, parts, key, n):
    """The n-th token, from 0, whose key it is."""
    token = first_with(logits, at, size, parts, key)
    while n > 0:
        token = next_with(logits, at, size, parts, key, token)
        n -= 1
    return token


@jit(device=True)
def token_at_weight(logits, weights, at, size, parts, bound, target):
    """The first token at which those from key `bound` on, in order of token id, weigh more than `target` together."""
    low, high = 0, size - 1
    while low < high:
        middle = (low + high) // 2
        total = _NOTHING
        for i in range(cuda.threadIdx.x, middle + 1, cuda.blockDim.x):
            if key_of(logits[at + i]) >= bound:
                total += weights[at + i]
        if sum_over_block(total, parts) > target:
            high = middle
        else:
            low = middle + 1
    return np.int32(low)


@jit(device=True)
def tokens_until(above, weight, target):
    """How many tokens of one weight it takes to get from `above` to `target`, as a float64."""
    return (target - above) / weight if weight > 0 else _NOTHING


@jit(device=True)
def clamp(x, least, most):
    """A float64 as an int32 of least..most."""
    return np.int32(min(max(x, np.float64(least)), np.float64(most)))


@jit(device=True)
def draw_token(logits, weights, at, size, parts, most, total, top_k, top_p, min_p, draw):
    """The token of a row whose weights are known; total: their sum, most: the largest key."""
    # Kept are all tokens above the key `bound`, and of those on it the first `ties`; together they weigh `total`.
    bound, ties = np.uint32(0), np.int32(size)
    ordered = 0 < top_k < size or top_p < 1
    if 0 < top_k < size:
        bound = key_at_rank(logits, at, size, parts, top_k, most)
        ties = np.int32(top_k - count_from(logits, at, size, parts, next_key(bound)))
        above = weight_from(logits, weights, at, size, parts, next_key(bound))
        total = above + ties * weights[at + first_with(logits, at, size, parts, bound)]
    if top_p < 1:
        target = top_p * total
        crossing = key_at_weight(logits, weights, at, size, parts, target, False, bound, most)
        ties = ties if crossing == bound else count_on(logits, at, size, parts, crossing)
        bound = crossing
        above = weight_from(logits, weights, at, size, parts, next_key(bound))
        weight = weights[at + first_with(logits, at, size, parts, bound)]
        ties = clamp(math.ceil(tokens_until(above, weight, target)), 1, ties)
        total = above + ties * weight
    if min_p > 0:
        likely = least_likely(logits, weights, at, size, parts, bound, min_p)
        if likely > bound:
            bound, ties = likely, count_on(logits, at, size, parts, likely)
            total = weight_from(logits, weights, at, size, parts, bound)
    if not ordered:
        return token_at_weight(logits, weights, at, size, parts, bound, draw * total)

    key = key_at_weight(logits, weights, at, size, parts, draw * total, True, bound, most)
    above = weight_from(logits, weights, at, size, parts, next_key(key))
    weight = weights[at + first_with(logits, at, size, parts, key)]
    ties = ties if key == bound else count_on(logits, at, size, parts, key)
    return nth_with(logits, at, size, parts, key, clamp(tokens_until(above, weight, draw * total), 0, ties - 1))


@kernel(
    "float32* logits, float64* weights, float64* temperatures, int32* top_ks, float64* top_ps, float64* min_ps,"
    "float64* draws, int32* tokens, int32 size, int32 stride"
)
def sample_rows(logits, weights, temperatures, top_ks, top_ps, min_ps, draws, tokens, size, stride):
    """tokens (rows,) of logits (rows, stride), of which `size` are the vocabulary's; one block a row (blockIdx.x).

    weights: (rows, stride), written here.
    """
    parts = cuda.shared.array(32, types.float64)
    row = cuda.blockIdx.x
    at = row * stride
    largest = largest_logit(logits, at, size, parts)
    token = np.int32(NOT_FINITE)
    if abs(largest) < _INFINITY:
        most = key_of(np.float32(largest))
        if temperatures[row] == 0:
            token = first_with(logits, at, size, parts, most)
        else:
            total = weigh(logits, weights, at, size, parts, largest, temperatures[row])
            token = draw_token(
                logits, weights, at, size, parts, most, total, top_ks[row], top_ps[row], min_ps[row], draws[row]
            )
    if cuda.threadIdx.x == 0:
        tokens[row] = token


@dataclass(frozen=True)
class Choices:
    """How the next token of each row is chosen; arrays of the host, (rows,)."""

    temperatures: NDArray[np.float64]  # 0: the likeliest token
    top_k: NDArray[np.int32]  # 0: all
    top_p: NDArray[np.float64]  # 1: all
    min_p: NDArray[np.float64]  # 0: all
    draws: NDArray[np.float64]  # one number in [0, 1) of each row's random generator


@dataclass(frozen=True)
class SamplingBuffers:
    """Arrays of the device: Choices as `sample` uploads them, and room for weights and tokens."""

    numbers: Array  # (4 * rows,) float64
    top_k: Array  # (rows,) int32
    weights: Array  # (rows, stride) float64
    tokens: Array  # (rows,) int32


def allocate_sampling(device: Device, rows: int, stride: int) -> SamplingBuffers:
    """Buffers for up to `rows` rows of logits with a stride of `stride` items."""
    return SamplingBuffers(
        device.zeros(4 * rows, np.float64),
        device.zeros(rows, np.int32),
        device.zeros(rows * stride, np.float64),
        device.zeros(rows, np.int32),
    )


def sample(
    device: Device, buffers: SamplingBuffers, logits: Array, stride: int, vocabulary: int, choices: Choices
) -> NDArray[np.int32]:
    """The tokens (rows,) of logits (rows, stride); NOT_FINITE for a row whose logits are damaged."""
    n = len(choices.draws)
    numbers = np.concatenate([choices.temperatures, choices.top_p, choices.min_p, choices.draws])
    device.write(buffers.numbers, np.asarray(numbers, np.float64))
    device.write(buffers.top_k, np.asarray(choices.top_k, np.int32))
    temperatures, top_p, min_p, draws = (buffers.numbers[i * n : (i + 1) * n] for i in range(4))
    device.launch(
        sample_rows, (n,), SAMPLE_THREADS, logits, buffers.weights, temperatures, buffers.top_k, top_p, min_p, draws,
        buffers.tokens, vocabulary, stride,
    )  # fmt: skip
    tokens: NDArray[np.int32] = device.download(buffers.tokens)[:n]
    return tokens
