"""Activations as int8 with a scale per group of 32, for the integer dot products.

A quantised row of C columns is one buffer: C int8 values, then C / 32 float32 scales, then C / 32 float32 sums
(scale * sum of the group's values, which the weights' biases and minima multiply). 5 C / 4 bytes.
"""

from __future__ import annotations

import numpy as np

from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.simd import (
    absolute_f32,
    load_f32,
    max_lanes,
    maximum_f32,
    round_f32,
    splat_f32,
    store_real,
    store_whole_i8,
    sum_lanes,
)


@jit
def quantize_groups(x, out, columns, first, last):
    """Quantise columns first..last (multiples of 32) of a float32 row at address x into the buffer at `out`."""
    for start in range(first, last, 32):
        a = load_f32(x + 4 * start)
        b = load_f32(x + 4 * start + 64)
        scale = max_lanes(maximum_f32(absolute_f32(a), absolute_f32(b))) / np.float32(127)
        inverse = splat_f32(np.float32(1) / scale if scale > 0 else np.float32(0))
        a = round_f32(a * inverse)
        b = round_f32(b * inverse)
        store_whole_i8(out + start, a)
        store_whole_i8(out + start + 16, b)
        store_real(out + columns + start // 8, scale)
        store_real(out + columns + columns // 8 + start // 8, scale * sum_lanes(a + b))
