"""The largest scale of each row of a neuron-major matrix: the unit of its sums is chosen by it (rows.py)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.formats import FORMATS, WEIGHT_FORMATS, Parts, WeightFormat

# Formats whose weighted rows are added up in integers: all that have levels and scales.
INTEGER_FORMATS: frozenset[WeightFormat] = frozenset(
    name for name in WEIGHT_FORMATS if FORMATS[name].activation_bits < 32
)


def row_bounds(parts: Parts) -> NDArray[np.float32]:
    """The largest scale of each row, (..., rows), of a matrix in one of INTEGER_FORMATS."""
    scales = parts[".scale"]
    if scales.dtype == np.float16:  # compared as integers, which has the same order and is many times faster
        largest = (scales.view(np.uint16) & 0x7FFF).max(-1).view(np.float16).astype(np.float32)
        return np.ascontiguousarray(largest)
    return np.ascontiguousarray(np.abs(parts[".row"][..., 0]) * scales.max(-1))
