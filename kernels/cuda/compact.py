"""Lists of the neurons that are predicted active, made on the device, in ascending order."""

from __future__ import annotations

import numpy as np
from numba import cuda

from svdengine.kernels.cuda.intrinsics import FULL, jit, kernel, lane_index, warp_index
from svdengine.kernels.cuda.workspace import COUNTS, PREDICTED, TOTAL

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
    for w in range(first, end):
        mask = masks[at + w]
        if np.uint32(mask >> np.uint32(lane)) & np.uint32(1):
            listed[to + before + below(mask, lane)] = np.int32(32 * w + lane)
        before = np.int32(before + cuda.popc(mask))
    return total


@kernel(
    "int32* neurons, int32* lengths, int64* counts, int32 size, int32 stride",
    launch_bounds=COMPACT_THREADS,
)
def list_every(neurons, lengths, counts, size, stride):
    """List all `size` neurons for each row (blockIdx.y).

    neurons: rows of `stride` items. lengths: (rows,). counts: (rows, COUNTS), to which predicted and all neurons are
    added.
    """
    i = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if i < size:
        neurons[cuda.blockIdx.y * stride + i] = i
    if i == 0:
        set_length(lengths, counts, cuda.blockIdx.y, size, size)


@jit(device=True)
def set_length(lengths, counts, batch_row, length, size):
    """Set the length of a row's list, and count its neurons; by one thread."""
    lengths[batch_row] = length
    counts[COUNTS * batch_row + PREDICTED] += length
    counts[COUNTS * batch_row + TOTAL] += size
