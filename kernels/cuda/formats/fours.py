"""Four weights at a time: what the chunks of all formats are made of."""

from __future__ import annotations

from typing import Any

import numpy as np

from svdengine.kernels.cuda.intrinsics import as_float, jit, ldg128, ldg128_once

_ZERO = np.float32(0)
NO_SUMS = (_ZERO, _ZERO, _ZERO, _ZERO)


@jit(device=True)
def dot_four(values, x, at):
    """Four values times four activations from item `at`."""
    a = ldg128(x, at)
    low = values[0] * as_float(a[0]) + values[1] * as_float(a[1])
    return low + (values[2] * as_float(a[2]) + values[3] * as_float(a[3]))


@jit(device=True)
def add_four(total, h, values):
    """total + h * values, of four."""
    return (
        total[0] + h * values[0],
        total[1] + h * values[1],
        total[2] + h * values[2],
        total[3] + h * values[3],
    )


@jit(device=True)
def load_sixteen_bytes(words, base, j):
    """Chunk j of 16 bytes."""
    return ldg128_once(words, base + 4 * j)


def consecutive(columns: int) -> Any:
    """`column_of` a format whose chunks are neighbouring columns."""

    @jit(device=True)
    def column_of(j, k):
        return columns * j + 4 * k

    return column_of
