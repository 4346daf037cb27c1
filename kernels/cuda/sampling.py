"""Sampling on the device: temperature, top-k, top-p and min-p as scheduling/sampler.py defines them, or greedily.

Many blocks survey the vocabulary (kernels/cuda/sample_survey.py). Then one block a row takes the likeliest token, or
draws one: without top-k and top-p from the slice of the vocabulary on which the random number falls, and otherwise from
the tokens that a filter may keep, sorted. Where these are too many it reads the whole row (sample_whole.py). Random
numbers come from the host. What is added up are integers (sample_weights.py), so no order of threads shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numba import cuda
from numba.cuda import types
from numpy.typing import NDArray

from svdengine.kernels.cuda.device import Device
from svdengine.kernels.cuda.intrinsics import jit, kernel
from svdengine.kernels.cuda.sample_survey import (
    DRAW,
    INVERSE,
    MIN_P,
    SURVEY_THREADS,
    TOP_P,
    best_of_row,
    first_of_slice,
    gather,
    is_ordered,
    spread,
    survey,
)
from svdengine.kernels.cuda.sample_weights import (
    floor_of,
    logit_of_rank,
    rank_of,
    scan_block,
    token_of_rank,
    weigh,
)
from svdengine.kernels.cuda.sample_whole import SUMS, draw_token, token_at
from svdengine.kernels.cuda.workspace import CHOICE_NUMBERS, MOST_LISTED, SLICES, Workspace
from svdengine.kernels.executor import NOT_FINITE, Choice

SAMPLE_THREADS = 512
MOST_TOKENS = 1 << 19  # of a vocabulary: sums of limbs fit in 32 bits, and tokens in a rank
_INFINITY = np.float32(np.inf)
_HIGHEST = 0xFFFFFFFF  # of all keys
_MOST_INVERSE = 3e38  # that a float32 holds: a temperature below leaves the likeliest tokens alone


@jit(device=True)
def sort_down(ranks, room):
    """Sort `room` ranks in shared memory, a power of two of them, the largest first (Batcher's bitonic sort, 1968)."""
    size = 2
    while size <= room:
        step = size >> 1
        while step > 0:
            cuda.syncthreads()
            for i in range(cuda.threadIdx.x, room >> 1, cuda.blockDim.x):
                low = 2 * i - (i & (step - 1))
                a, b = ranks[low], ranks[low + step]
                if (a < b) == ((low & size) == 0):
                    ranks[low], ranks[low + step] = b, a
            step >>= 1
        size <<= 1
    cuda.syncthreads()


@jit(device=True)
def sum_listed(ranks, first, last, largest, inverse, floor):
    """The weight of some of the listed tokens."""
    total = np.int64(0)
    for i in range(first, last):
        total += weigh(logit_of_rank(ranks[i]), largest, inverse, floor)
    return total


@jit(device=True)
def draw_listed(ranks, count, parts, found, largest, inverse, total, top_k, top_p, min_p, draw):
    """A token of `count` sorted ones, which are all that filters may keep. total: the weight of the whole vocabulary.

    top_k: 0 where it keeps all.
    """
    share = (count + cuda.blockDim.x - 1) // cuda.blockDim.x
    first = min(cuda.threadIdx.x * share, count)
    last = min(first + share, count)
    none, limit = np.int64(0), count
    if top_k > 0:
        limit = min(np.int64(top_k), count)
    before, kept = scan_block(sum_listed(ranks, first, min(last, limit), largest, inverse, none), parts)
    if top_k > 0:
        total = kept
    if top_p < 1:
        # The token that crosses the line is kept.
        target = min(max(np.int64(math.ceil(top_p * total)), np.int64(1)), total)
        if cuda.threadIdx.x == 0:
            found[0] = limit
        cuda.syncthreads()
        for i in range(first, min(last, limit)):
            weight = weigh(logit_of_rank(ranks[i]), largest, inverse, none)
            if before < target <= before + weight:
                found[0] = np.int64(i) + 1
            before += weight
        cuda.syncthreads()
        limit = found[0]
        cuda.syncthreads()
    floor = floor_of(min_p)
    before, total = scan_block(sum_listed(ranks, first, min(last, limit), largest, inverse, floor), parts)
    target = min(np.int64(draw * total), total - 1)
    for i in range(first, min(last, limit)):
        weight = weigh(logit_of_rank(ranks[i]), largest, inverse, floor)
        if before <= target < before + weight:
            found[0] = np.int64(token_of_rank(ranks[i]))
        before += weight
    cuda.syncthreads()
    return np.int32(found[0])


@jit(device=True)
def draw_unordered(logits, at, size, slice_weights, row, parts, found, largest, inverse, min_p, draw):
    """A token of a row that no filter needs in order: from the slice on which the number falls."""
    share = (SLICES + cuda.blockDim.x - 1) // cuda.blockDim.x
    first = min(cuda.threadIdx.x * share, SLICES)
    last = min(first + share, SLICES)
    own = np.int64(0)
    for i in range(first, last):
        own += slice_weights[row * SLICES + i]
    before, total = scan_block(own, parts)
    target = min(np.int64(draw * total), total - 1)
    for i in range(first, last):
        weight = slice_weights[row * SLICES + i]
        if before <= target < before + weight:
            found[0], found[1] = np.int64(i), before
        before += weight
    cuda.syncthreads()
    begin, end = first_of_slice(found[0], size), first_of_slice(found[0] + 1, size)
    target -= found[1]
    cuda.syncthreads()
    token = token_at(
        logits, at + begin, end - begin, parts, found, largest, inverse, floor_of(min_p), False, np.int64(0),
        np.int64(_HIGHEST), target,
    )  # fmt: skip
    return np.int32(begin + token)


@kernel(
    "float32* logits, float64* numbers, int32* top_ks, int64* tops, int64* slice_weights, int32* listed,"
    " int32* candidates, int32* tokens, int32 rows, int32 size, int32 stride",
    launch_bounds=(SAMPLE_THREADS, 1),
)
def choose(logits, numbers, top_ks, tops, slice_weights, listed, candidates, tokens, rows, size, stride):
    """tokens of logits (rows, stride), of which `size` are the vocabulary's; one block a row (blockIdx.x).

    numbers: (CHOICE_NUMBERS, rows): temperatures, top-p, min-p, random numbers, and 1 / temperatures. A row whose
    temperature is negative is left out. The others come from kernels/cuda/sample_survey.py.
    """
    sums = cuda.shared.array(SUMS, types.uint32)
    ranks = cuda.shared.array(MOST_LISTED, types.int64)
    parts = cuda.shared.array(32, types.int64)
    found = cuda.shared.array(3, types.int64)
    row = cuda.blockIdx.x
    at, temperature = row * stride, numbers[row]
    if temperature < 0:
        return
    best = best_of_row(tops, row, parts)
    largest, token = logit_of_rank(best), token_of_rank(best)
    if not abs(largest) < _INFINITY:
        token = np.int32(NOT_FINITE)
    elif temperature > 0:
        top_p, min_p, draw = numbers[TOP_P * rows + row], numbers[MIN_P * rows + row], numbers[DRAW * rows + row]
        inverse, top_k, count = numbers[INVERSE * rows + row], top_ks[row], listed[row]
        if not is_ordered(numbers, top_ks, row, rows, size):
            token = draw_unordered(
                logits, at, size, slice_weights, row, parts, found, largest, inverse, min_p, draw
            )  # fmt: skip
        elif count > MOST_LISTED:
            token = draw_token(logits, at, size, sums, parts, found, largest, inverse, top_k, top_p, min_p, draw)
        else:
            room = 1
            while room < count:
                room <<= 1
            for i in range(cuda.threadIdx.x, room, cuda.blockDim.x):
                ranks[i] = np.int64(0)
                if i < count:
                    candidate = candidates[row * MOST_LISTED + i]
                    ranks[i] = rank_of(logits[at + candidate], np.int64(candidate))
            sort_down(ranks, room)
            own = np.int64(0)
            for i in range(cuda.threadIdx.x, SLICES, cuda.blockDim.x):
                own += slice_weights[row * SLICES + i]
            _, total = scan_block(own, parts)
            limit = top_k if 0 < top_k < size else 0
            token = draw_listed(
                ranks, np.int64(count), parts, found, largest, inverse, total, limit, top_p, min_p, draw
            )  # fmt: skip
    if cuda.threadIdx.x == 0:
        tokens[row] = token


def pack_choices(choices: Sequence[Choice | None], rows: int) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """Numbers (CHOICE_NUMBERS, rows) and top-k (rows,) of the first rows, as the kernels read them."""
    numbers, top_k = np.zeros((CHOICE_NUMBERS, rows)), np.zeros(rows, np.int32)
    for row, choice in enumerate(choices):
        if choice is None:
            numbers[0, row] = -1
        else:
            inverse = min(1 / choice.temperature, _MOST_INVERSE) if choice.temperature else 0.0
            numbers[:, row] = choice.temperature, choice.top_p, choice.min_p, choice.draw, inverse
            top_k[row] = choice.top_k
    return numbers, top_k


def sample_tokens(device: Device, work: Workspace, wanted: int, vocab_size: int, drawn: bool = True) -> None:
    """work.chosen of the first `wanted` rows of work.logits, as work.choice_numbers and work.choice_top_k say.

    `drawn`: whether some are; otherwise all are the likeliest.
    """
    sizes, numbers, top_ks = work.sizes, work.choice_numbers, work.choice_top_k
    rows, stride, grid = sizes.rows, sizes.logits, (SLICES, wanted)
    device.launch(
        survey, grid, SURVEY_THREADS, work.logits, numbers, work.tops, work.bin_counts, work.bin_weights, work.listed,
        vocab_size, stride,
    )  # fmt: skip
    if drawn:
        device.launch(
            spread, grid, SURVEY_THREADS, work.logits, numbers, top_ks, work.tops, work.slice_weights, work.bin_counts,
            work.bin_weights, rows, vocab_size, stride,
        )  # fmt: skip
        device.launch(
            gather, grid, SURVEY_THREADS, work.logits, numbers, top_ks, work.tops, work.bin_counts, work.bin_weights,
            work.listed, work.candidates, rows, vocab_size, stride,
        )  # fmt: skip
    device.launch(
        choose, (wanted,), SAMPLE_THREADS, work.logits, numbers, top_ks, work.tops, work.slice_weights, work.listed,
        work.candidates, work.chosen, rows, vocab_size, stride,
    )  # fmt: skip
