"""What many blocks find out of rows of logits before one block chooses a token of each: the work on whole vocabularies.

The vocabulary of a row is cut into SLICES, a block each. `survey` finds the likeliest token of each slice. `spread`
adds up the weights of each slice and, where a filter needs an order, counts and weights on BINS of the distance to the
largest logit. `gather` lists the tokens on those bins that a filter may keep, which are seldom more than MOST_LISTED.
"""

from __future__ import annotations

import numpy as np
from numba import cuda
from numba.cuda import types

from svdengine.kernels.cuda.atomics import fetch_add
from svdengine.kernels.cuda.intrinsics import add_atomic, jit, kernel
from svdengine.kernels.cuda.sample_weights import (
    LIMBS,
    LOWEST,
    add_weight,
    distance_of,
    floor_of,
    largest_in_block,
    logit_of_rank,
    rank_of,
    scan_block,
    weigh,
    weight_on,
)
from svdengine.kernels.cuda.workspace import BINS, MOST_LISTED, SLICES

SURVEY_THREADS = 256
TEMPERATURE, TOP_P, MIN_P, DRAW, INVERSE = range(5)  # rows of the numbers that say how tokens are chosen
_INFINITY = np.float32(np.inf)
_SUMS = LIMBS * BINS
_STEP = np.float32(BINS / LOWEST)


@jit(device=True)
def is_ordered(numbers, top_ks, row, rows, size):
    """Whether a filter of a row needs the order of its tokens."""
    return 0 < top_ks[row] < size or numbers[TOP_P * rows + row] < 1


@jit(device=True)
def first_of_slice(slice_index, size):
    """Where a slice of the vocabulary begins."""
    return min(slice_index * ((size + SLICES - 1) // SLICES), size)


@jit(device=True)
def bin_of(logit, largest, inverse):
    """The bin of a token that weighs something; likelier tokens are in lower ones."""
    quotient, _ = distance_of(logit, largest, inverse)
    return min(np.int32(-quotient * _STEP), np.int32(BINS - 1))


@jit(device=True)
def best_of_row(tops, row, parts):
    """The rank of the likeliest token of a row, in every thread."""
    best = np.int64(0)
    for i in range(cuda.threadIdx.x, SLICES, cuda.blockDim.x):
        best = max(best, tops[row * SLICES + i])
    return largest_in_block(best, parts)


@kernel(
    "float32* logits, float64* numbers, int64* tops, int32* bin_counts, int64* bin_weights, int32* listed,"
    " int32 size, int32 stride",
    launch_bounds=SURVEY_THREADS,
)
def survey(logits, numbers, tops, bin_counts, bin_weights, listed, size, stride):
    """tops (rows, SLICES): the rank of the likeliest token of each slice (blockIdx.x) of a row (blockIdx.y).

    logits: (rows, stride), of which `size` are the vocabulary's. Bins and lists of the row are emptied. A row whose
    temperature is negative is left out.
    """
    parts = cuda.shared.array(32, types.int64)
    row, part = cuda.blockIdx.y, cuda.blockIdx.x
    if numbers[row] < 0:
        return
    best = np.int64(0)
    for i in range(first_of_slice(part, size) + cuda.threadIdx.x, first_of_slice(part + 1, size), cuda.blockDim.x):
        best = max(best, rank_of(logits[row * stride + i], np.int64(i)))
    best = largest_in_block(best, parts)
    if cuda.threadIdx.x == 0:
        tops[row * SLICES + part] = best
        if part == 0:
            listed[row] = np.int32(0)
    share = (BINS + SLICES - 1) // SLICES
    for i in range(part * share + cuda.threadIdx.x, min((part + 1) * share, BINS), cuda.blockDim.x):
        bin_counts[row * BINS + i] = np.int32(0)
        bin_weights[row * BINS + i] = np.int64(0)


@kernel(
    "float32* logits, float64* numbers, int32* top_ks, int64* tops, int64* slice_weights, int32* bin_counts,"
    " int64* bin_weights, int32 rows, int32 size, int32 stride",
    launch_bounds=SURVEY_THREADS,
)
def spread(logits, numbers, top_ks, tops, slice_weights, bin_counts, bin_weights, rows, size, stride):
    """slice_weights (rows, SLICES), and counts and weights (rows, BINS) of tokens that weigh something.

    Weights of slices are of all tokens where a filter needs an order, and otherwise of those that min-p keeps. Bins are
    filled where an order is needed.
    """
    parts = cuda.shared.array(32, types.int64)
    sums = cuda.shared.array(_SUMS, types.uint32)
    counts = cuda.shared.array(BINS, types.int32)
    row, part = cuda.blockIdx.y, cuda.blockIdx.x
    if numbers[row] <= 0:
        return
    largest = logit_of_rank(best_of_row(tops, row, parts))
    if not abs(largest) < _INFINITY:
        return
    inverse = numbers[INVERSE * rows + row]
    ordered, floor = is_ordered(numbers, top_ks, row, rows, size), np.int64(0)
    if not ordered:
        floor = floor_of(numbers[MIN_P * rows + row])
    for i in range(cuda.threadIdx.x, BINS, cuda.blockDim.x):
        counts[i] = np.int32(0)
        for k in range(LIMBS):
            sums[k * BINS + i] = np.uint32(0)
    cuda.syncthreads()

    total = np.int64(0)
    for i in range(first_of_slice(part, size) + cuda.threadIdx.x, first_of_slice(part + 1, size), cuda.blockDim.x):
        logit = logits[row * stride + i]
        weight = weigh(logit, largest, inverse, floor)
        total += weight
        if ordered and weight > 0:
            place = bin_of(logit, largest, inverse)
            cuda.atomic.add(counts, place, np.int32(1))
            add_weight(sums, BINS, place, weight)
    total = scan_block(total, parts)[1]
    if cuda.threadIdx.x == 0:
        slice_weights[row * SLICES + part] = total
    if ordered:
        for i in range(cuda.threadIdx.x, BINS, cuda.blockDim.x):
            if counts[i] > 0:
                fetch_add(bin_counts, row * BINS + i, counts[i])
                add_atomic(bin_weights, row * BINS + i, weight_on(sums, BINS, i))


@jit(device=True)
def last_bin(numbers, top_ks, bin_counts, bin_weights, row, rows, size, parts, found):
    """The last bin with tokens that the filters of a row may keep, in every thread. found: 1 int32, shared.

    Where top-k keeps some, all of these are needed: top-p is a share of what they weigh.
    """
    share = (BINS + cuda.blockDim.x - 1) // cuda.blockDim.x
    first = min(cuda.threadIdx.x * share, BINS)
    last = min(first + share, BINS)
    top_k, top_p = top_ks[row], numbers[TOP_P * rows + row]
    counting = 0 < top_k < size
    own = np.int64(0)
    for i in range(first, last):
        own += bin_counts[row * BINS + i] if counting else bin_weights[row * BINS + i]
    before, total = scan_block(own, parts)
    enough = np.int64(top_k) if counting else np.int64(top_p * total) + np.int64(1)
    if cuda.threadIdx.x == 0:
        found[0] = np.int32(BINS - 1)
    cuda.syncthreads()
    for i in range(first, last):
        own = np.int64(bin_counts[row * BINS + i]) if counting else bin_weights[row * BINS + i]
        if before < enough <= before + own:
            found[0] = np.int32(i)
        before += own
    cuda.syncthreads()
    return found[0]


@kernel(
    "float32* logits, float64* numbers, int32* top_ks, int64* tops, int32* bin_counts, int64* bin_weights,"
    " int32* listed, int32* candidates, int32 rows, int32 size, int32 stride",
    launch_bounds=SURVEY_THREADS,
)
def gather(logits, numbers, top_ks, tops, bin_counts, bin_weights, listed, candidates, rows, size, stride):
    """candidates (rows, MOST_LISTED): the tokens on bins up to the last one that matters, in any order.

    listed: (rows,) how many there are, of which those beyond MOST_LISTED are left out.
    """
    parts = cuda.shared.array(32, types.int64)
    found = cuda.shared.array(1, types.int32)
    row, part = cuda.blockIdx.y, cuda.blockIdx.x
    if numbers[row] <= 0 or not is_ordered(numbers, top_ks, row, rows, size):
        return
    largest = logit_of_rank(best_of_row(tops, row, parts))
    if not abs(largest) < _INFINITY:
        return
    inverse = numbers[INVERSE * rows + row]
    last = last_bin(numbers, top_ks, bin_counts, bin_weights, row, rows, size, parts, found)
    for i in range(first_of_slice(part, size) + cuda.threadIdx.x, first_of_slice(part + 1, size), cuda.blockDim.x):
        logit = logits[row * stride + i]
        if weigh(logit, largest, inverse, np.int64(0)) > 0 and bin_of(logit, largest, inverse) <= last:
            to = fetch_add(listed, row, np.int32(1))
            if to < MOST_LISTED:
                candidates[row * MOST_LISTED + to] = np.int32(i)
