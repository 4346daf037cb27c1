"""Reading memory and nothing else, for the measurement of its bandwidth (bandwidth.py)."""

from __future__ import annotations

from svdengine.kernels.cpu.pieces import piece
from svdengine.kernels.cpu.simd import load_f32, store_real, sum_lanes, zero_f32


@piece
def read_range(start, stop, total):
    """Read the bytes from address start to stop, a multiple of 256; store a sum, so that nothing is left out."""
    a = zero_f32()
    b = zero_f32()
    c = zero_f32()
    d = zero_f32()
    for at in range(start, stop, 256):
        a = a + load_f32(at)
        b = b + load_f32(at + 64)
        c = c + load_f32(at + 128)
        d = d + load_f32(at + 192)
    store_real(total, sum_lanes((a + b) + (c + d)))
