"""Low-bit copies of a matrix that keep its outputs on given inputs, rather than its weights.

Codes are chosen column by column, and the error of each is carried over to the columns that are still to be rounded,
along the inputs' correlations (GPTQ, Frantar et al. 2022, arXiv:2210.17323). Then the scales of every row are fitted
once more, all together, by least squares in the metric of the inputs: so the copy never loses more than zeros would.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from svdengine.converters.parallel import over_parts
from svdengine.kernels.formats import Parts, padded_columns
from svdengine.kernels.lowbit import BLOCK, lowbit_scales, pack_lowbit

Array = NDArray[np.float32]

_DAMPING = 0.1  # of the mean variance, added to the diagonal: less than that fits the calibration text too closely
_ROWS = 1024  # whose scales are fitted at once


def fit_lowbit(matrix: Array, covariance: NDArray[np.float64], bits: int) -> Parts:
    """Store matrix (f, d) in 1 or 2 bits so that E |(matrix - stored) x|^2 is small for inputs of covariance (d, d)."""
    code = _carry_errors(matrix, _error_weights(covariance), bits)
    return pack_lowbit(code, _fit_scales(matrix, code, covariance, bits), bits)


def _error_weights(covariance: NDArray[np.float64]) -> Array:
    """The upper Cholesky factor of the inverse covariance, (d, d): how an error spreads over later columns."""
    d = len(covariance)
    mean = float(np.trace(covariance)) / d or 1.0
    damped = covariance / mean + _DAMPING * np.eye(d)
    return np.ascontiguousarray(np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32))


def _carry_errors(matrix: Array, weights: Array, bits: int) -> NDArray[np.uint8]:
    """Codes (f, C) of the columns, each rounded after the errors of those before it were carried over."""
    f, d = matrix.shape
    left = matrix.copy()
    codes = np.zeros((f, padded_columns(d)), np.uint8)
    for start in range(0, d, BLOCK):
        block = slice(start, min(start + BLOCK, d))
        own = np.ascontiguousarray(left[:, block])
        errors, within = np.empty_like(own), np.ascontiguousarray(weights[block, block])

        def carry(rows: slice) -> None:
            step = lowbit_scales(own[rows], bits)[:, 0].astype(np.float32)  # noqa: B023
            codes[rows, block] = _carry_within(own[rows], step, within, bits, errors[rows])  # noqa: B023

        over_parts(carry, f)
        left[:, block.stop :] -= errors @ weights[block, block.stop :]
    return codes


@numba.njit(nogil=True, cache=True)
def _carry_within(left, step, weights, bits, errors):  # type: ignore[no-untyped-def]
    """Codes of a block (rows, columns) of weights that are `left`, changed in place, and the errors to carry on."""
    rows, columns = left.shape
    codes = np.empty((rows, columns), np.uint8)
    most = np.float32((1 << bits) - 1)
    for i in range(rows):
        inverse = np.float32(1) / step[i] if step[i] > 0 else np.float32(0)
        for j in range(columns):
            value = left[i, j]
            if bits == 1:
                code = np.float32(1) if value > 0 else np.float32(0)
            else:
                code = min(max(np.floor(value * inverse) + np.float32(2), np.float32(0)), most)
            codes[i, j] = code
            error = (value - (code - most / np.float32(2)) * step[i]) / weights[j, j]
            errors[i, j] = error
            for k in range(j + 1, columns):
                left[i, k] -= weights[j, k] * error
    return codes


def _fit_scales(
    matrix: Array, code: NDArray[np.uint8], covariance: NDArray[np.float64], bits: int
) -> NDArray[np.float16]:
    """Scales (f, blocks) that minimise (row - stored row) covariance (row - stored row)^T for each row."""
    f, d = matrix.shape
    blocks = code.shape[1] // BLOCK
    scale = float(np.trace(covariance)) / d or 1.0
    c = np.zeros((code.shape[1], code.shape[1]), np.float32)
    c[:d, :d] = covariance / scale
    scales = np.empty((f, blocks), np.float16)
    for start in range(0, f, _ROWS):
        rows = slice(start, start + _ROWS)
        levels = (code[rows] - np.float32((1 << bits) - 1) / 2).astype(np.float32)
        target = matrix[rows] @ c[:d]  # (rows, C)
        by_block = levels.reshape(-1, blocks, BLOCK)
        right = (target.reshape(-1, blocks, BLOCK) * by_block).sum(-1, dtype=np.float64)
        gram = np.empty((len(levels), blocks, blocks))
        for b in range(blocks):
            seen = by_block[:, b] @ c[b * BLOCK : (b + 1) * BLOCK, b * BLOCK :]  # (rows, columns from this block on)
            gram[:, b, b:] = gram[:, b:, b] = np.einsum(
                "rbj,rbj->rb", seen.reshape(-1, blocks - b, BLOCK), by_block[:, b:]
            )
        gram += 1e-6 * np.trace(gram, axis1=1, axis2=2)[:, None, None] / blocks * np.eye(blocks) + 1e-30 * np.eye(
            blocks
        )
        scales[rows] = np.linalg.solve(gram, right[..., None])[..., 0]
    return scales
