"""The read bandwidth of a GPU's memory: the floor that products and decode steps are measured against."""

from __future__ import annotations

import statistics

import numpy as np
from numba import cuda

from svdengine.kernels.cuda.device import Array, Device
from svdengine.kernels.cuda.intrinsics import kernel, ldg128

THREADS = 256
BLOCKS = 1024
_BYTES = 1 << 30  # far more than any cache holds
_LEAST_SHARE = 4  # of the free memory at most this part is used
_REPETITIONS = 9


@kernel("uint32* words, uint32* sums, int64 count")
def read_words(words, sums, count):
    """sums (threads of the grid,) = the words that each thread read, by exclusive or; `count` is a multiple of 4."""
    thread = np.int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
    step = np.int64(4) * cuda.gridDim.x * cuda.blockDim.x
    at, total = 4 * thread, np.uint32(0)
    while at + 3 * step < count:  # four loads are on their way at once
        a, b = ldg128(words, at), ldg128(words, at + step)
        c, d = ldg128(words, at + 2 * step), ldg128(words, at + 3 * step)
        total ^= a[0] ^ a[1] ^ a[2] ^ a[3] ^ b[0] ^ b[1] ^ b[2] ^ b[3]
        total ^= c[0] ^ c[1] ^ c[2] ^ c[3] ^ d[0] ^ d[1] ^ d[2] ^ d[3]
        at += 4 * step
    while at < count:
        a = ldg128(words, at)
        total ^= a[0] ^ a[1] ^ a[2] ^ a[3]
        at += step
    sums[thread] = total


class Reader:
    """Reads a buffer, which also drives everything else out of the cache."""

    def __init__(self, device: Device, size: int = _BYTES) -> None:
        self._device = device
        words = max(4, min(size, device.free_bytes() // _LEAST_SHARE) // 16 * 4)
        self._words: Array = device.zeros(words, np.uint32)
        self._sums: Array = device.zeros(BLOCKS * THREADS, np.uint32)
        self.size = 4 * words

    def read(self) -> None:
        """Read all of it, behind what the device was given before."""
        self._device.launch(read_words, (BLOCKS,), THREADS, self._words, self._sums, self.size // 4)


def read_bandwidth(device: Device, reader: Reader | None = None) -> float:
    """Read bandwidth in GB/s: the median of several readings of up to 1 GiB."""
    reader = reader or Reader(device)
    reader.read()  # the first launch loads the kernel
    return reader.size / statistics.median(device.seconds(reader.read) for _ in range(_REPETITIONS)) / 1e9
