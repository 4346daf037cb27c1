"""A matrix as compiled code sees it: a row of integers, which are the addresses of its parts, its format and sizes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.formats import FORMATS, WeightFormat, padded_columns

# DATA, SCALE, MIN, ROW: addresses of the parts that the format has. ROW_BYTES: of one row's values. ACTIVATION_BITS: of
# what it is multiplied with. BOUNDS: of a matrix whose weighted rows are summed in integers, the address of what
# row_bounds.py has of them. BIAS_VECTOR: the address of what is added to the product.
# SCALE_BYTES, MIN_BYTES, ROW_PART_BYTES: sizes of those parts.
DATA, SCALE, MIN, ROW, FORMAT, ROWS, COLUMNS, ROW_BYTES, ACTIVATION_BITS, BOUNDS = range(10)
SCALE_BYTES, MIN_BYTES, ROW_PART_BYTES, BIAS_VECTOR, MATRIX_FIELDS = range(10, 15)
PART_FIELDS = {"": DATA, ".scale": SCALE, ".min": MIN, ".row": ROW}
_SIZES = {".scale": SCALE_BYTES, ".min": MIN_BYTES, ".row": ROW_PART_BYTES}
RESIDUALS = {2: 102, 1: 101}  # codes of a predictor's low-bit residual (kernels/lowbit.py), by its bits
Q2, Q1 = RESIDUALS[2], RESIDUALS[1]
PANEL_CODES: dict[WeightFormat, int] = {"q8": 208, "q6": 206, "q4": 204}  # of interleaved matrices (panels.py)
FIRST_PANEL_CODE = 200
PANEL_ROWS = 16


def matrix_fields(
    parts: Mapping[str, NDArray], weight_format: WeightFormat, rows: int, columns: int, layers: int = 1
) -> NDArray[np.int64]:
    """(layers, BIAS_VECTOR) addresses and sizes of a stored matrix, or of a stack of `layers` of them.

    The parts must have been checked: C-contiguous, of the format's shapes and types. They must outlive the fields.
    """
    stored = FORMATS[weight_format]
    fields = fields_of(parts, stored.code, rows, columns, layers)
    fields[:, ROW_BYTES] = stored.row_bytes(padded_columns(columns))
    fields[:, ACTIVATION_BITS] = stored.activation_bits
    return fields


def fields_of(parts: Mapping[str, NDArray], code: int, rows: int, columns: int, layers: int = 1) -> NDArray[np.int64]:
    """As `matrix_fields`, for anything that has a code; without what only formats have."""
    fields = np.zeros((layers, BIAS_VECTOR), np.int64)
    fields[:, FORMAT], fields[:, ROWS], fields[:, COLUMNS] = code, rows, padded_columns(columns)
    for suffix, array in parts.items():
        size = array.nbytes // layers
        fields[:, PART_FIELDS[suffix]] = array.ctypes.data + np.arange(layers) * size
        if suffix in _SIZES:
            fields[:, _SIZES[suffix]] = size
    return fields


def check_codes(matrices: NDArray[np.int64]) -> None:
    """Raise ValueError when a matrix, a row of `matrices` that has rows itself, has a code that no kernel reads."""
    known = {stored.code for stored in FORMATS.values()} | {*RESIDUALS.values(), *PANEL_CODES.values()}
    for matrix in matrices:
        if matrix[ROWS] and int(matrix[FORMAT]) not in known:
            raise ValueError(f"a matrix has the format code {matrix[FORMAT]}, which no kernel reads")
