"""Low-bit copies of a matrix, for predictors: one or two bits a weight and a float16 scale for every 64 columns.

q2   `name` (rows, C / 4) uint8; `name.scale` (rows, C / 64) float16; w = scale * (code - 1.5), code in 0..3.
     Of every 64 columns, byte j holds columns j, j + 16, j + 32 and j + 48, lowest bits first.
q1   `name` (rows, C / 8) uint8; `name.scale` (rows, C / 64) float16; w = scale * (code - 0.5), code in 0..1.
     Column j is bit j % 8 of byte j / 8.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.formats import Parts, padded_columns

BLOCK = 64  # columns that share a scale


def quantize_lowbit(matrix: NDArray[np.float32], bits: int) -> Parts:
    """Store a (rows, columns) float32 matrix in 1 or 2 bits, with the scales of least squared error."""
    scale = lowbit_scales(matrix, bits)
    return pack_lowbit(lowbit_codes(matrix, scale, bits), scale, bits)


def lowbit_scales(matrix: NDArray[np.float32], bits: int) -> NDArray[np.float16]:
    """The scale of least squared error for every block of columns: (rows, blocks). Padding does not weigh in."""
    rows, columns = matrix.shape
    blocks = _padded(matrix).reshape(rows, -1, BLOCK)
    inside = _padded(np.ones((1, columns), np.float32)).reshape(-1, BLOCK)
    if bits == 1:
        scale = 2 * np.abs(blocks).sum(-1) / inside.sum(-1)  # of +-s/2: twice the mean magnitude
    else:
        # Alternate between codes and least-squares scales, from the best step for a normal distribution.
        scale = np.sqrt(np.square(blocks).sum(-1) / inside.sum(-1)) * np.float32(0.996)
        for _ in range(4):
            levels = (_two_bit_codes(blocks, scale) - np.float32(1.5)) * inside
            scale = np.abs((levels * blocks).sum(-1)) / np.square(levels).sum(-1)
    return scale.astype(np.float16)


def lowbit_codes(matrix: NDArray[np.float32], scale: NDArray[np.float16], bits: int) -> NDArray[np.uint8]:
    """The nearest code of every weight of (rows, columns) for positive scales, padded: (rows, C)."""
    blocks = _padded(matrix).reshape(len(matrix), -1, BLOCK)
    code = (blocks > 0).astype(np.uint8) if bits == 1 else _two_bit_codes(blocks, scale.astype(np.float32))
    return code.reshape(len(matrix), -1)


def pack_lowbit(code: NDArray[np.uint8], scale: NDArray[np.float16], bits: int) -> Parts:
    """The stored parts of codes (rows, C) and scales (rows, C / 64)."""
    if bits == 1:
        packed = np.packbits(code, axis=1, bitorder="little")
    else:
        quarters = code.reshape(len(code), -1, 4, BLOCK // 4)
        shifted = quarters << np.array([0, 2, 4, 6], np.uint8)[:, None]
        packed = np.bitwise_or.reduce(shifted, axis=2)
    return {"": np.ascontiguousarray(packed.reshape(len(code), -1)), ".scale": scale}


def dequantize_lowbit(parts: Parts, bits: int, columns: int) -> NDArray[np.float32]:
    """The (rows, columns) float32 matrix that the stored parts stand for."""
    data, scale = parts[""], parts[".scale"].astype(np.float32)
    rows = len(data)
    if bits == 1:
        code = np.unpackbits(data, axis=1, bitorder="little").reshape(rows, -1, BLOCK).astype(np.float32) - 0.5
    else:
        packed = data.reshape(rows, -1, BLOCK // 4)
        code = np.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], 2).reshape(rows, -1, BLOCK) - np.float32(1.5)
    return np.ascontiguousarray((code * scale[..., None]).reshape(rows, -1)[:, :columns])


def _two_bit_codes(blocks: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.uint8]:
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    return np.clip(np.floor(blocks * inverse[..., None]) + 2, 0, 3).astype(np.uint8)


def _padded(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    rows, columns = matrix.shape
    padded = np.zeros((rows, padded_columns(columns)), np.float32)
    padded[:, :columns] = matrix
    return padded
