"""Activations in integers with a scale per group of 32, for the integer dot products.

An activation is 16 bits, 256 * high + low in two int8 planes. Weights are multiplied with both: reading them costs more
than the second product, and rounding activations to 8 bits would cost more quality than rounding weights to 8 does.
It would also let a token depend visibly on the rows beside it, whose sums differ in the last bit: where that moves an
activation to its next level, the level should be a small one. A predictor's residuals read the high plane alone.

A quantised row of C columns is one buffer: C high bytes, C low bytes, then per group of 32 a float32 scale, the scaled
sum of the 16-bit values, that of the high plane (what weights are offset by multiplies these), and in int32 what takes
back what weights that are offset by BIAS add to a sum of products: -BIAS times the sum of the 16-bit values.
"""

from __future__ import annotations

import numpy as np

from svdengine.kernels.cpu.dot import BIAS
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.simd import (
    absolute_f32,
    fma,
    load_f32,
    max_lanes,
    maximum_f32,
    minimum_f32,
    round_f32,
    splat_f32,
    store_int,
    store_real,
    store_whole_i8,
    sum_lanes,
)

LARGEST = np.float32(127 * 256)
_STEP = np.float32(256)
_LOWEST = np.float32(-127)  # -128 would overflow where weights lend activations their sign


@jit
def quantize_groups(x, out, columns, first, last):
    """Quantise columns first..last (multiples of 32) of a float32 row at address x into the buffer at `out`."""
    scales = out + 2 * columns
    sums = scales + columns // 8
    high_sums = sums + columns // 8
    offsets = high_sums + columns // 8
    for start in range(first, last, 32):
        a = load_f32(x + 4 * start)
        b = load_f32(x + 4 * start + 64)
        scale = max_lanes(maximum_f32(absolute_f32(a), absolute_f32(b))) / LARGEST
        inverse = splat_f32(np.float32(1) / scale if scale > 0 else np.float32(0))
        a = round_f32(a * inverse)
        b = round_f32(b * inverse)
        high_a = round_f32(a * splat_f32(np.float32(1) / _STEP))
        high_b = round_f32(b * splat_f32(np.float32(1) / _STEP))
        low_a = maximum_f32(fma(high_a, splat_f32(-_STEP), a), splat_f32(_LOWEST))
        low_b = maximum_f32(fma(high_b, splat_f32(-_STEP), b), splat_f32(_LOWEST))
        # 128 does not fit: half a step that rounded down to the even number below.
        low_a = minimum_f32(low_a, splat_f32(-_LOWEST))
        low_b = minimum_f32(low_b, splat_f32(-_LOWEST))
        store_whole_i8(out + start, high_a)
        store_whole_i8(out + start + 16, high_b)
        store_whole_i8(out + columns + start, low_a)
        store_whole_i8(out + columns + start + 16, low_b)
        high = sum_lanes(high_a + high_b) * _STEP
        store_real(scales + start // 8, scale)
        whole = high + sum_lanes(low_a + low_b)  # exact: at most 2^20
        store_real(sums + start // 8, scale * whole)
        store_int(offsets + start // 8, -BIAS * np.int64(whole))
        store_real(high_sums + start // 8, scale * high)
