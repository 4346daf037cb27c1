"""Calls one compiled kernel by itself: a test of an edited line takes seconds, and not the minute of a whole step.

    harness = Kernel(dot_row)                          # any function that jit.py or pieces.py of kernels/cpu decorated
    harness(matrix, 3, at(x), at(quantized), 0)        # arrays of integers as they are, memory by its address

What a kernel returns as a vector cannot reach Python: `stored(kernel)` writes it to an address given as last argument.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.matrix import BIAS_VECTOR, MATRIX_FIELDS, matrix_fields
from svdengine.kernels.cpu.pieces import whole
from svdengine.kernels.cpu.quantize import quantize_groups
from svdengine.kernels.cpu.simd import store_f32
from svdengine.kernels.cpu.workspace import quantized_bytes
from svdengine.kernels.formats import Parts, WeightFormat, padded_columns


class Kernel:
    """A kernel that Python can call. It is compiled at its first call, for the types that it is given."""

    def __init__(self, kernel: Any) -> None:
        kernel = whole(kernel)

        @numba.njit(nogil=True, error_model="numpy")
        def call(*arguments):
            return kernel(*arguments)

        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)


def at(array: NDArray) -> int:
    """The address of an array's memory, which must be kept alive meanwhile."""
    assert array.flags.c_contiguous
    return array.ctypes.data


def stored(kernel: Any) -> Any:
    """The kernel with its vector of 16 float32 written to an address, its last argument."""

    @jit
    def store(*arguments):
        store_f32(arguments[-1], kernel(*arguments[:-1]))

    return store


def matrix_of(parts: Parts, weight_format: WeightFormat, rows: int, columns: int) -> NDArray[np.int64]:
    """What compiled code knows of a stored matrix. The parts must be kept alive."""
    fields = np.zeros(MATRIX_FIELDS, np.int64)
    fields[:BIAS_VECTOR] = matrix_fields(parts, weight_format, rows, columns)[0]
    return fields


def padded(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n, columns) with zeros up to the columns of stored matrices."""
    out = np.zeros((len(x), padded_columns(x.shape[1])), np.float32)
    out[:, : x.shape[1]] = x
    return out


def quantized_rows(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Activations (n, padded columns) as the kernel of quantize.py lays them out, (n, bytes)."""
    out = np.zeros((len(x), quantized_bytes(x.shape[1])), np.uint8)
    quantize = Kernel(quantize_groups)
    for row, to in zip(x, out, strict=True):
        quantize(at(row), at(to), x.shape[1], 0, x.shape[1])
    return out
