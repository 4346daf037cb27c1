"""A matrix row of any format, a chunk at a time (kernels/cuda/formats): where it lies, and its product with another.

The parts of a matrix are those of kernels/cuda/model.py: `words`, `scale`, `low` and `row`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from svdengine.kernels.cuda.formats.table import kernels_of
from svdengine.kernels.cuda.intrinsics import jit
from svdengine.kernels.formats import WeightFormat

_ZERO = np.float32(0)


def matrix_parameters(weight_format: WeightFormat, prefix: str = "") -> str:
    """The parameters of a kernel that are a matrix, for `kernel`."""
    return kernels_of(weight_format).parameters(prefix)


def neuron_matrix_parameters(weight_format: WeightFormat, prefix: str = "") -> str:
    """The same of a matrix with a row for each neuron, of which those from `hot` on may lie in host memory, `cold`."""
    return f"{matrix_parameters(weight_format, prefix)}, uint32* {prefix}cold"


def _held_row(split):
    @jit(device=True)
    def held_row(words, cold, hot, r):
        if split and r >= hot:
            return cold, r - hot
        return words, r

    return held_row


# By whether a matrix is split: held_row(words, cold, hot, r), the array that holds the words of row r, and their row.
HELD_ROW = {split: _held_row(split) for split in (False, True)}


@cache
def row_product(weight_format: WeightFormat) -> Any:
    """dot(words, held, scale, low, row, r, stride, x, at, lane): one lane's share of row r times an activation row.

    The words of row r are row `held` of those; the activation row begins at item `at` of x.
    """
    kernels = kernels_of(weight_format)
    load, chunk = kernels.load_chunk, kernels.dot_chunk
    columns, chunk_words = kernels.chunk_columns, kernels.chunk_words
    by_four, by_two = kernels.listed_at_once == 4, kernels.listed_at_once == 2

    @jit(device=True)
    def dot(words, held, scale, low, row, r, stride, x, at, lane):
        count = stride // columns
        base = held * (chunk_words * count)
        total = _ZERO
        j = lane
        while by_four and j + 96 < count:
            w0 = load(words, base, j)
            w1 = load(words, base, j + 32)
            w2 = load(words, base, j + 64)
            w3 = load(words, base, j + 96)
            total += chunk(w0, scale, low, row, r, stride, x, at, j)
            total += chunk(w1, scale, low, row, r, stride, x, at, j + 32)
            total += chunk(w2, scale, low, row, r, stride, x, at, j + 64)
            total += chunk(w3, scale, low, row, r, stride, x, at, j + 96)
            j += 128
        while by_two and j + 32 < count:
            w0 = load(words, base, j)
            w1 = load(words, base, j + 32)
            total += chunk(w0, scale, low, row, r, stride, x, at, j)
            total += chunk(w1, scale, low, row, r, stride, x, at, j + 32)
            j += 64
        while j < count:
            total += chunk(load(words, base, j), scale, low, row, r, stride, x, at, j)
            j += 32
        return total

    return dot
