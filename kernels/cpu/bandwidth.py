"""The machine's read bandwidth: the floor that a decode step is measured against."""

from __future__ import annotations

import threading
import time

import numpy as np

from svdengine.kernels.cpu.library import loaded
from svdengine.kernels.cpu.parts import BANDWIDTH

_SIZE = 256 << 20  # bytes: far beyond any cache


def read_bandwidth(threads: int, repetitions: int = 5) -> float:
    """GB/s at which `threads` threads together read memory, each its own part; the best of the repetitions."""
    buffer = np.ones(_SIZE, np.uint8)
    start, part = buffer.ctypes.data, _SIZE // threads // 256 * 256
    read_range = loaded(frozenset({BANDWIDTH})).function("read_range", 3)
    sums = np.zeros(threads, np.float32)
    totals = [sums[i:].ctypes.data for i in range(threads)]
    read_range(start, start + 256, totals[0])
    best = float("inf")
    for _ in range(repetitions):
        members = [
            threading.Thread(target=read_range, args=(start + i * part, start + (i + 1) * part, totals[i]))
            for i in range(threads)
        ]
        begin = time.perf_counter()
        for member in members:
            member.start()
        for member in members:
            member.join()
        best = min(best, time.perf_counter() - begin)
    return part * threads / best / 1e9
