"""Lists of the neurons that are predicted active, made on the device, in ascending order."""

from __future__ import annotations

import numpy as np
from numba import cuda

from svdengine.kernels.cuda.intrinsics import FULL, add_atomic, as_float, as_word, jit, kernel, lane_index, warp_index
from svdengine.kernels.cuda.workspace import PREDICTED, TOTAL

COMPACT_THREADS = 1024


@jit(device=True)
def ballot(condition):
    """The lanes of this warp where the condition holds, as bits: uint32."""
    return np.uint32(cuda.ballot_sync(FULL, condition))


@jit(device=True)
def below(mask, lane):
    """How many bits of the mask lie below the lane's: int32."""
    return np.int32(cuda.popc(np.uint32(mask & np.uint32((np.int64(1) << lane) - 1))))


@jit(device=True)
def list_masked(masks, at, words, listed, to, found):
    """List, from `to` on, the numbers of the bits that are set in `words` words of `masks` from `at`; returns how many.

    By a block of whole warps, with `found`: MOST_WARPS int32 in shared memory. Each warp has a stretch of the words: it
    counts, learns how many come before, then writes.
    """
    lane, warp, warps = lane_index(), warp_index(), cuda.blockDim.x >> 5
    stretch = (words + warps - 1) // warps
    first = min(warp * stretch, words)
    end = min(first + stretch, words)
    count = np.int32(0)
    for w in range(first + lane, end, 32):
        count = np.int32(count + cuda.popc(masks[at + w]))
    for k in range(5):
        count = np.int32(count + cuda.shfl_xor_sync(FULL, count, 1 << k))
    if lane == 0:
        found[warp] = count
    cuda.syncthreads()

    before = total = np.int32(0)
    for w in range(warps):
        before = np.int32(before + (found[w] if w < warp else 0))
        total = np.int32(total + found[w])
    for w in range(first, end, 32):
        word = masks[at + w + lane] if w + lane < end else np.uint32(0)
        for i in range(min(32, end - w)):
            mask = as_word(cuda.shfl_sync(FULL, as_float(word), i))
            if np.uint32(mask >> np.uint32(lane)) & np.uint32(1):
                listed[to + before + below(mask, lane)] = np.int32(32 * (w + i) + lane)
            before = np.int32(before + cuda.popc(mask))
    return total


@kernel(
    "int32* neurons, int32* lengths, int64* counts, int32 size, int32 stride",
    launch_bounds=COMPACT_THREADS,
)
def list_every(neurons, lengths, counts, size, stride):
    """List all `size` neurons for each row (blockIdx.y).

    neurons: rows of `stride` items. lengths: (rows,). counts: (COUNTS,) of the layer, to which predicted and all
    neurons are added.
    """
    i = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if i < size:
        neurons[cuda.blockIdx.y * stride + i] = i
    if i == 0:
        lengths[cuda.blockIdx.y] = size
        count_neurons(counts, size, size)


@jit(device=True)
def count_neurons(counts, length, size):
    """Count the neurons of a row: `length` that are predicted, of `size`; by one thread."""
    add_atomic(counts, PREDICTED, length)
    add_atomic(counts, TOTAL, size)
