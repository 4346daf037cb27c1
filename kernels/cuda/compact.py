"""Lists of the neurons that are predicted active, made on the device, in ascending order."""

from __future__ import annotations

import numpy as np
from numba import cuda
from numba.cuda import types

from svdengine.kernels.cuda.intrinsics import FULL, jit, kernel, lane_index, warp_index
from svdengine.kernels.cuda.workspace import COUNTS, PREDICTED, TOTAL

COMPACT_THREADS = 1024
_ZERO = np.float32(0)


@jit(device=True)
def ballot(condition):
    """The lanes of this warp where the condition holds, as bits: uint32."""
    return np.uint32(cuda.ballot_sync(FULL, condition))


@jit(device=True)
def below(mask, lane):
    """How many bits of the mask lie below the lane's: int32."""
    return np.int32(cuda.popc(np.uint32(mask & np.uint32((np.int64(1) << lane) - 1))))


@jit(device=True)
def is_positive(scores, at, i, end):
    """Whether item i of the row that begins at `at` is positive; past the end it is not."""
    return i < end and scores[at + i] > _ZERO


@kernel("float32* scores, int32* neurons, int32* lengths, int64* counts, int32 size, int32 stride")
def list_positive(scores, neurons, lengths, counts, size, stride):
    """List the positive ones of `size` scores of a row (blockIdx.x), by one block of whole warps.

    scores, neurons: rows of `stride` items. lengths: (rows,). counts: (rows, COUNTS), to which predicted and all
    neurons are added. A NaN is not positive.
    """
    found = cuda.shared.array(32, types.int32)
    lane, warp, warps = lane_index(), warp_index(), cuda.blockDim.x >> 5
    at = cuda.blockIdx.x * stride
    # Each warp has a stretch of the row: it counts, learns how many come before, then writes.
    stretch = (size + 32 * warps - 1) // (32 * warps) * 32
    first = warp * stretch
    end = min(first + stretch, size)
    count = np.int32(0)
    for i in range(first, end, 32):
        count = np.int32(count + cuda.popc(ballot(is_positive(scores, at, i + lane, end))))
    if lane == 0:
        found[warp] = count
    cuda.syncthreads()

    before = total = np.int32(0)
    for w in range(warps):
        before = np.int32(before + (found[w] if w < warp else 0))
        total = np.int32(total + found[w])
    for i in range(first, end, 32):
        positive = is_positive(scores, at, i + lane, end)
        mask = ballot(positive)
        if positive:
            neurons[at + before + below(mask, lane)] = i + lane
        before = np.int32(before + cuda.popc(mask))
    if cuda.threadIdx.x == 0:
        set_length(lengths, counts, cuda.blockIdx.x, total, size)


@kernel("int32* neurons, int32* lengths, int64* counts, int32 size, int32 stride")
def list_every(neurons, lengths, counts, size, stride):
    """List all `size` neurons for a row (blockIdx.y); arguments are those of `list_positive`."""
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
