"""Low-bit copies of a matrix that keep its outputs on given inputs, rather than its weights.

Codes are chosen column by column, and the error of each is carried over to the columns that are still to be rounded,
along the inputs' correlations (GPTQ, Frantar et al. 2022, arXiv:2210.17323). Then the scales of every row are fitted
once more, all together, by least squares in the metric of the inputs: so the copy never loses more than zeros would.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

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
    middle = np.float32((1 << bits) - 1) / 2
    for start in range(0, d, BLOCK):
        block = np.ascontiguousarray(left[:, start : start + BLOCK].T)  # (columns, f)
        step = lowbit_scales(block.T, bits)[:, 0].astype(np.float32)
        errors = np.empty_like(block)
        for j in range(len(block)):
            code = _nearest_codes(block[j], step, bits)
            codes[:, start + j] = code
            errors[j] = (block[j] - (code - middle) * step) / weights[start + j, start + j]
            block[j + 1 :] -= weights[start + j, start + j + 1 : start + len(block), None] * errors[j]
        left[:, start + BLOCK :] -= errors.T @ weights[start : start + BLOCK, start + BLOCK :]
    return codes


def _nearest_codes(column: Array, step: Array, bits: int) -> NDArray[np.float32]:
    """Codes of one column (f,) for the scales (f,) of its rows."""
    if bits == 1:
        return (column > 0).astype(np.float32)
    inverse = np.divide(np.float32(1), step, out=np.zeros_like(step), where=step > 0)
    return np.clip(np.floor(column * inverse) + 2, 0, 3)


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
