"""Weight formats: how a matrix is stored in the file and in memory, and the NumPy definition of each.

Columns are padded with zeros to a multiple of 64, so that no kernel has a tail. With C padded columns, a matrix is

    f32, f16, bf16   `name` (rows, C); bfloat16 is held as uint16
    q8               `name` (rows, C) int8; `name.scale` (rows, C / 32) float16
                     w = scale * q, scale = max |w| / 127 of its group of 32
    q4               `name` (rows, C / 2) uint8; `name.scale`, `name.min` (rows, C / 32) uint8; `name.row` (rows, 2) f32
                     w = row[0] * scale * q - row[1] * min, q in 0..15. Of every 64 columns, byte j holds column j in
                     its low half and column j + 32 in its high half.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

WeightFormat = Literal["f32", "f16", "bf16", "q8", "q4"]
WEIGHT_FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)
COLUMN_MULTIPLE = 64
GROUP = 32  # columns that share a scale

Parts = dict[str, NDArray]  # suffix ("", ".scale", ...) -> array


def padded_columns(columns: int) -> int:
    """Columns as stored."""
    return -(-columns // COLUMN_MULTIPLE) * COLUMN_MULTIPLE


def stored_parts(weight_format: WeightFormat, rows: int, columns: int) -> dict[str, tuple[tuple[int, int], str]]:
    """Suffix -> (shape, safetensors dtype) of every array that a (rows, columns) matrix is stored as."""
    c = padded_columns(columns)
    if weight_format == "q8":
        return {"": ((rows, c), "I8"), ".scale": ((rows, c // GROUP), "F16")}
    if weight_format == "q4":
        groups = (rows, c // GROUP)
        return {
            "": ((rows, c // 2), "U8"),
            ".scale": (groups, "U8"),
            ".min": (groups, "U8"),
            ".row": ((rows, 2), "F32"),
        }
    return {"": ((rows, c), {"f32": "F32", "f16": "F16", "bf16": "BF16"}[weight_format])}


def quantize(matrix: NDArray[np.float32], weight_format: WeightFormat) -> Parts:
    """Store a (rows, columns) float32 matrix. Raises ValueError when it holds NaN or infinity, or overflows f16."""
    matrix = np.asarray(matrix, np.float32)
    if not np.isfinite(matrix).all():
        raise ValueError("the weights hold NaN or infinity")
    rows, columns = matrix.shape
    w = np.zeros((rows, padded_columns(columns)), np.float32)
    w[:, :columns] = matrix
    if weight_format == "f32":
        return {"": w}
    if weight_format == "f16":
        with np.errstate(over="ignore"):
            half = w.astype(np.float16)
        if not np.isfinite(half).all():
            raise ValueError("a weight is too large for f16; use bf16 or f32")
        return {"": half}
    if weight_format == "bf16":
        return {"": to_bfloat16(w)}
    return _quantize_q8(w) if weight_format == "q8" else _quantize_q4(w)


def dequantize(parts: Parts, weight_format: WeightFormat, columns: int) -> NDArray[np.float32]:
    """The (rows, columns) float32 matrix that the stored parts stand for."""
    data = parts[""]
    if weight_format == "q8":
        w = _by_group(data.astype(np.float32)) * parts[".scale"].astype(np.float32)[..., None]
    elif weight_format == "q4":
        row = parts[".row"].astype(np.float32)
        scale = row[:, :1] * parts[".scale"].astype(np.float32)
        low = row[:, 1:] * parts[".min"].astype(np.float32)
        w = _by_group(_unpack_nibbles(data).astype(np.float32)) * scale[..., None] - low[..., None]
    elif weight_format == "bf16":
        w = from_bfloat16(data)
    else:
        w = data.astype(np.float32)
    return np.ascontiguousarray(w.reshape(len(data), -1)[:, :columns])


def to_bfloat16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round float32 to bfloat16 (to nearest, ties to even), held as uint16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def from_bfloat16(x: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Widen bfloat16, held as uint16, to float32."""
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _by_group(w: NDArray) -> NDArray:
    return w.reshape(w.shape[0], -1, GROUP)


def _quantize_q8(w: NDArray[np.float32]) -> Parts:
    groups = _by_group(w)
    scale = np.abs(groups).max(-1) / np.float32(127)
    if scale.max(initial=0.0) > np.finfo(np.float16).max:
        raise ValueError("a weight is too large for q8")
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    q = np.clip(np.rint(groups * inverse[..., None]), -127, 127).astype(np.int8)
    return {"": q.reshape(w.shape), ".scale": scale.astype(np.float16)}


def _quantize_q4(w: NDArray[np.float32]) -> Parts:
    """Affine 4-bit groups whose scales and minima are 8-bit multiples of two float32 values a row."""
    groups = _by_group(w)
    low = np.maximum(-groups.min(-1), 0)  # what is subtracted; 0 stays representable
    step = (np.maximum(groups.max(-1), 0) + low) / np.float32(15)
    row = (np.stack([step.max(1), low.max(1)], 1) / np.float32(255)).astype(np.float32)

    def relative(values: NDArray[np.float32], unit: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.rint(np.divide(values, unit[:, None], out=np.zeros_like(values), where=unit[:, None] > 0))

    minimum = relative(low, row[:, 1])
    offset = minimum * row[:, 1:]
    # A group's range is re-measured from the rounded minimum, so that its largest weight still fits.
    scale = np.clip(relative((np.maximum(groups.max(-1), 0) + offset) / np.float32(15), row[:, 0]), 0, 255)
    actual = scale * row[:, :1]
    inverse = np.divide(np.float32(1), actual, out=np.zeros_like(actual), where=actual > 0)
    q = np.clip(np.rint((groups + offset[..., None]) * inverse[..., None]), 0, 15).astype(np.uint8)
    return {
        "": _pack_nibbles(q.reshape(w.shape)),
        ".scale": scale.astype(np.uint8),
        ".min": minimum.astype(np.uint8),
        ".row": row,
    }


def _pack_nibbles(q: NDArray[np.uint8]) -> NDArray[np.uint8]:
    halves = q.reshape(len(q), -1, 2, 32)
    packed: NDArray[np.uint8] = halves[:, :, 0] | (halves[:, :, 1] << np.uint8(4))
    return packed.reshape(len(q), -1)


def _unpack_nibbles(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    packed = data.reshape(len(data), -1, 32)
    return np.stack([packed & 15, packed >> 4], 2).reshape(len(data), -1)
