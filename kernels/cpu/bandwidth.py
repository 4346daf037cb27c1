"""The machine's read bandwidth: the floor that a decode step is measured against."""

from __future__ import annotations

import threading
import time

import numpy as np

from svdengine.kernels.cpu.jit import entry
from svdengine.kernels.cpu.simd import load_f32, sum_lanes, zero_f32

_SIZE = 256 << 20  # bytes: far beyond any cache


@entry
def read_range(start: int, stop: int) -> float:
    """Read the bytes from address start to stop, a multiple of 256, and give a sum so that nothing is left out."""
    a = zero_f32()
    b = zero_f32()
    c = zero_f32()
    d = zero_f32()
    for at in range(start, stop, 256):
        a = a + load_f32(at)
        b = b + load_f32(at + 64)
        c = c + load_f32(at + 128)
        d = d + load_f32(at + 192)
    return sum_lanes((a + b) + (c + d))


def read_bandwidth(threads: int, repetitions: int = 5) -> float:
    """GB/s at which `threads` threads together read memory, each its own part; the best of the repetitions."""
    buffer = np.ones(_SIZE, np.uint8)
    start, part = buffer.ctypes.data, _SIZE // threads // 256 * 256
    read_range(start, start + 256)
    best = float("inf")
    for _ in range(repetitions):
        members = [
            threading.Thread(target=read_range, args=(start + i * part, start + (i + 1) * part)) for i in range(threads)
        ]
        begin = time.perf_counter()
        for member in members:
            member.start()
        for member in members:
            member.join()
        best = min(best, time.perf_counter() - begin)
    return part * threads / best / 1e9
