"""Weight formats: how a matrix is stored in the file and in memory, and the NumPy definition of each.

A format is one `Format` here and one file a device (kernels/cpu/formats, kernels/cuda/formats). Columns are padded with
zeros to a multiple of 64, so that no kernel has a tail. With C padded columns, a matrix is

    f32, f16, bf16   `name` (rows, C); bfloat16 is held as uint16
    q8               `name` (rows, C) int8; `name.scale` (rows, C / 32) float16
                     w = scale * q, scale = max |w| / 127 of its group of 32
    q4               `name` (rows, C / 2) uint8; `name.scale`, `name.min` (rows, C / 32) uint8; `name.row` (rows, 2) f32
                     w = row[0] * scale * q - row[1] * min, q in 0..15. Of every 64 columns, byte j holds column j in
                     its low half and column j + 32 in its high half.
    q6               as q4 with q in 0..63 and `name` (rows, C * 3 / 4): of every 64 columns, 32 bytes hold the low four
                     bits as q4 does, then 16 bytes the upper two: byte j has columns j, j + 16, j + 32 and j + 48,
                     lowest pair first.
    ternary          as q4 with q in 0..2, scale and min 1, row[0] = row[1], and `name` (rows, C / 4): of every 64
                     columns 16 bytes, byte j with columns j, j + 16, j + 32 and j + 48, lowest pair first. So each
                     weight of a row is -row[0], 0 or row[0].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from svdengine.models.tensors import TensorSpec

WeightFormat = Literal["f32", "f16", "bf16", "q8", "q6", "q4", "ternary"]
WEIGHT_FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)
COLUMN_MULTIPLE = 64
GROUP = 32  # columns that share a scale

Parts = dict[str, NDArray]  # suffix ("", ".scale", ...) -> array

# Of each safetensors dtype that parts have, the NumPy type that holds it; bfloat16 is held as its bits.
STORED_DTYPES = MappingProxyType(
    {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I8": np.int8, "U8": np.uint8}
)


@dataclass(frozen=True)
class Part:
    """One array of a stored matrix."""

    suffix: str  # of the array's name; "" for the values
    dtype: str  # of safetensors
    width: Callable[[int], int]  # items of a row, by the matrix's padded columns

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row; `columns` are padded."""
        return self.width(columns) * np.dtype(STORED_DTYPES[self.dtype]).itemsize


@dataclass(frozen=True)
class Format:
    """All there is to know about a format that does not depend on the device."""

    name: WeightFormat
    parts: tuple[Part, ...]  # the values first
    activation_bits: int  # of the activations that kernels multiply with it: 32 are float32
    quantize: Callable[[NDArray[np.float32]], Parts]  # (rows, C) finite float32 -> stored parts
    dequantize: Callable[[Parts], NDArray[np.float32]]  # stored parts -> (rows, C)

    @property
    def code(self) -> int:
        """The number by which compiled code knows the format."""
        return WEIGHT_FORMATS.index(self.name)

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row's values, without scales; `columns` are padded."""
        return self.parts[0].row_bytes(columns)

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Bytes of all parts of a (rows, columns) matrix."""
        return rows * sum(part.row_bytes(padded_columns(columns)) for part in self.parts)


def format_named(name: WeightFormat) -> Format:
    """The format of this name. Raises ValueError when there is none."""
    if name not in FORMATS:
        raise ValueError(f"found the weight format {name!r}, expected one of {', '.join(FORMATS)}")
    return FORMATS[name]


def padded_columns(columns: int) -> int:
    """Columns as stored."""
    return -(-columns // COLUMN_MULTIPLE) * COLUMN_MULTIPLE


def stored_parts(weight_format: WeightFormat, rows: int, columns: int) -> dict[str, tuple[tuple[int, int], str]]:
    """Suffix -> (shape, safetensors dtype) of every array that a (rows, columns) matrix is stored as."""
    c = padded_columns(columns)
    return {part.suffix: ((rows, part.width(c)), part.dtype) for part in format_named(weight_format).parts}


def gather_parts(arrays: Mapping[str, NDArray], name: str) -> Parts:
    """Suffix -> array of all parts of the matrix `name` that there are."""
    return {suffix: arrays[name + suffix] for suffix in PART_SUFFIXES if name + suffix in arrays}


def quantize(matrix: NDArray[np.float32], weight_format: WeightFormat) -> Parts:
    """Store a (rows, columns) float32 matrix. Raises ValueError when it holds NaN or infinity, or overflows f16."""
    matrix = np.asarray(matrix, np.float32)
    if not np.isfinite(matrix).all():
        raise ValueError("the weights hold NaN or infinity")
    rows, columns = matrix.shape
    w = np.zeros((rows, padded_columns(columns)), np.float32)
    w[:, :columns] = matrix
    return format_named(weight_format).quantize(w)


def dequantize(parts: Parts, weight_format: WeightFormat, columns: int) -> NDArray[np.float32]:
    """The (rows, columns) float32 matrix that the stored parts stand for."""
    return np.ascontiguousarray(format_named(weight_format).dequantize(parts)[:, :columns])


def check_stored(spec: TensorSpec, arrays: Mapping[str, NDArray], formats: Mapping[str, WeightFormat]) -> None:
    """Raise ValueError unless the arrays of a tensor are there, of the shapes and types that its format has."""
    lead = spec.shape[:-2] if spec.matrix else ()
    stored = {"": (spec.shape, "F32")}
    if spec.matrix:
        parts = stored_parts(formats[spec.name], *spec.shape[-2:])
        stored = {suffix: ((*lead, *shape), dtype) for suffix, (shape, dtype) in parts.items()}
    for suffix, (shape, dtype) in stored.items():
        array = arrays.get(spec.name + suffix)
        if array is None or array.shape != shape or array.dtype != STORED_DTYPES[dtype]:
            found = "nothing" if array is None else f"{array.dtype} {array.shape}"
            raise ValueError(f"{spec.name}{suffix}: found {found}, expected {dtype} {shape}")


def pack_affine(
    levels: NDArray[np.uint8],
    scale: NDArray[np.uint8],
    minimum: NDArray[np.uint8],
    row: NDArray[np.float32],
    weight_format: WeightFormat,
) -> Parts:
    """The stored parts of a `q4` or `q6` matrix whose levels (rows, C) were chosen elsewhere.

    scale, minimum: (rows, C / 32); row: (rows, 2).
    """
    packed = {"q4": _pack_nibbles, "q6": _pack_six_bits}[weight_format](levels)
    return {"": packed, ".scale": scale, ".min": minimum, ".row": row}


# Floats


def to_bfloat16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round float32 to bfloat16 (to nearest, ties to even), held as uint16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def from_bfloat16(x: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Widen bfloat16, held as uint16, to float32."""
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _quantize_f16(w: NDArray[np.float32]) -> Parts:
    with np.errstate(over="ignore"):
        half = w.astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError("a weight is too large for f16; use bf16 or f32")
    return {"": half}


# Groups of 32 columns


def _by_group(w: NDArray) -> NDArray:
    return w.reshape(w.shape[0], -1, GROUP)


def _scaled(q: NDArray, scale: NDArray) -> NDArray[np.float32]:
    """q (rows, C) times the scales of its groups (rows, C / 32)."""
    w: NDArray[np.float32] = _by_group(q.astype(np.float32)) * scale.astype(np.float32)[..., None]
    return w.reshape(q.shape)


def _inverse(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 / scale; 0 where the scale is 0."""
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)


def _check_scales(scale: NDArray[np.float32], name: str) -> None:
    if np.abs(scale).max(initial=0.0) > np.finfo(np.float16).max:
        raise ValueError(f"a weight is too large for {name}")


def _quantize_q8(w: NDArray[np.float32]) -> Parts:
    groups = _by_group(w)
    scale = np.abs(groups).max(-1) / np.float32(127)
    _check_scales(scale, "q8")
    q = np.clip(np.rint(groups * _inverse(scale)[..., None]), -127, 127).astype(np.int8)
    return {"": q.reshape(w.shape), ".scale": scale.astype(np.float16)}


def _dequantize_q8(parts: Parts) -> NDArray[np.float32]:
    return _scaled(parts[""], parts[".scale"])


def _pack_six_bits(q: NDArray[np.uint8]) -> NDArray[np.uint8]:
    low = _pack_nibbles(q & np.uint8(15)).reshape(len(q), -1, 32)
    pairs = (q >> np.uint8(4)).reshape(len(q), -1, 4, 16)
    high = np.bitwise_or.reduce(pairs << np.array([0, 2, 4, 6], np.uint8)[:, None], axis=2)
    return np.concatenate([low, high], 2).reshape(len(q), -1)


def _unpack_six_bits(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    blocks = data.reshape(len(data), -1, 48)
    low = _unpack_nibbles(blocks[:, :, :32].reshape(len(data), -1)).reshape(len(data), -1, 64)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = blocks[:, :, None, 32:] >> shifts & np.uint8(3)
    q: NDArray[np.uint8] = low | high.reshape(low.shape) << np.uint8(4)
    return q.reshape(len(data), -1)


def _affine(w: NDArray[np.float32], most: int) -> tuple[NDArray[np.uint8], Parts]:
    """Groups of levels 0..most, whose scales and minima are 8-bit multiples of two float32 values a row.

    Returns the levels (rows, C) and the parts beside them. A group's range is re-measured from the rounded minimum, so
    that its largest weight still fits.
    """
    groups = _by_group(w)
    low, high = np.maximum(-groups.min(-1), 0), np.maximum(groups.max(-1), 0)  # 0 stays representable
    row = (np.stack([(low + high).max(1) / np.float32(most), low.max(1)], 1) / np.float32(255)).astype(np.float32)
    minimum = _multiple(low, row[:, 1])
    offset = minimum * row[:, 1:]
    scale = np.clip(_multiple((high + offset) / np.float32(most), row[:, 0]), 0, 255)
    q = _levels(groups, scale * row[:, :1], offset, most)
    return q.reshape(w.shape), {".scale": scale.astype(np.uint8), ".min": minimum.astype(np.uint8), ".row": row}


def _multiple(values: NDArray[np.float32], unit: NDArray[np.float32]) -> NDArray[np.float32]:
    """values (rows, groups) as whole multiples of a unit (rows,); 0 where that is 0."""
    return np.rint(np.divide(values, unit[:, None], out=np.zeros_like(values), where=unit[:, None] > 0))


def _levels(
    groups: NDArray[np.float32], scale: NDArray[np.float32], offset: NDArray[np.float32], most: int
) -> NDArray[np.uint8]:
    """The nearest level of each weight (rows, groups, 32)."""
    return np.clip(np.rint((groups + offset[..., None]) * _inverse(scale)[..., None]), 0, most).astype(np.uint8)


def _dequantize_affine(q: NDArray[np.uint8], parts: Parts) -> NDArray[np.float32]:
    row = parts[".row"].astype(np.float32)
    scale = row[:, :1] * parts[".scale"].astype(np.float32)
    low = row[:, 1:] * parts[".min"].astype(np.float32)
    w: NDArray[np.float32] = _by_group(q.astype(np.float32)) * scale[..., None] - low[..., None]
    return w.reshape(q.shape)


def _quantize_q4(w: NDArray[np.float32]) -> Parts:
    q, beside = _affine(w, 15)
    return {"": _pack_nibbles(q), **beside}


def _dequantize_q4(parts: Parts) -> NDArray[np.float32]:
    return _dequantize_affine(_unpack_nibbles(parts[""]), parts)


def _quantize_q6(w: NDArray[np.float32]) -> Parts:
    """As `_affine`, but a group's range is cut into 63 steps or into 60, whichever leaves the least squared error.

    Where the source has 4 bits, its 15 steps are 4 of the 60 each, and its weights are met nearly exactly.
    """
    groups = _by_group(w)
    low, high = np.maximum(-groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    row = (np.stack([(low + high).max(1) / np.float32(60), low.max(1)], 1) / np.float32(255)).astype(np.float32)
    scale, minimum, error = _fit(groups, low, (low + high) / np.float32(63), row)
    coarse_scale, coarse_minimum, coarse_error = _fit(groups, low, (low + high) / np.float32(60), row)
    better = coarse_error < error
    scale, minimum = np.where(better, coarse_scale, scale), np.where(better, coarse_minimum, minimum)
    q = _levels(groups, scale * row[:, :1], minimum * row[:, 1:], 63)
    return {
        "": _pack_six_bits(q.reshape(w.shape)),
        ".scale": scale.astype(np.uint8),
        ".min": minimum.astype(np.uint8),
        ".row": row,
    }


def _fit(
    groups: NDArray[np.float32], low: NDArray[np.float32], step: NDArray[np.float32], row: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Multiples of the row's units for scale and minimum that suit levels of `step` above -low, and the squared error.

    For each minimum near the wanted one the best scale follows from sums over the group. All are (rows, groups).
    """
    q = np.rint((groups + low[..., None]) * _inverse(step)[..., None])
    x, xx, qs = groups.sum(-1), np.square(groups).sum(-1), q.sum(-1)
    qq, qx = np.square(q).sum(-1), (q * groups).sum(-1)
    nearest = _multiple(low, row[:, 1])
    best = None
    for by in (-1, 0, 1):
        minimum = np.clip(nearest + np.float32(by), 0, 255)
        offset = minimum * row[:, 1:]
        product = qx + offset * qs
        scale = np.clip(_multiple(np.divide(product, qq, out=np.zeros_like(qq), where=qq > 0), row[:, 0]), 0, 255)
        unit = scale * row[:, :1]
        error = xx + 2 * offset * x + GROUP * np.square(offset) - 2 * unit * product + np.square(unit) * qq
        if best is None:
            best = scale, minimum, error
        else:
            better = error < best[2]
            best = tuple(np.where(better, new, old) for new, old in zip((scale, minimum, error), best, strict=True))
    assert best is not None
    return best


def _dequantize_q6(parts: Parts) -> NDArray[np.float32]:
    return _dequantize_affine(_unpack_six_bits(parts[""]), parts)


def _quantize_ternary(w: NDArray[np.float32]) -> Parts:
    """Each weight as the nearest of -s, 0 and s, the row's largest magnitude: exact for rows that are ternary."""
    s = np.abs(w).max(1).astype(np.float32)
    q = (np.rint(w * _inverse(s)[:, None]) + 1).astype(np.uint8)
    ones = np.ones((len(w), w.shape[1] // GROUP), np.uint8)
    return {"": _pack_pairs(q), ".scale": ones, ".min": ones, ".row": np.stack([s, s], 1)}


def _dequantize_ternary(parts: Parts) -> NDArray[np.float32]:
    return _dequantize_affine(_unpack_pairs(parts[""]), parts)


def _pack_pairs(q: NDArray[np.uint8]) -> NDArray[np.uint8]:
    pairs = q.reshape(len(q), -1, 4, 16) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(pairs, axis=2)
    return packed.reshape(len(q), -1)


def _unpack_pairs(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    pairs = data.reshape(len(data), -1, 1, 16) >> np.array([0, 2, 4, 6], np.uint8)[:, None]
    return (pairs & np.uint8(3)).reshape(len(data), -1)


def _pack_nibbles(q: NDArray[np.uint8]) -> NDArray[np.uint8]:
    halves = q.reshape(len(q), -1, 2, 32)
    packed: NDArray[np.uint8] = halves[:, :, 0] | (halves[:, :, 1] << np.uint8(4))
    return packed.reshape(len(q), -1)


def _unpack_nibbles(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    packed = data.reshape(len(data), -1, 32)
    return np.stack([packed & 15, packed >> 4], 2).reshape(len(data), -1)


def _float(name: WeightFormat, dtype: str, quantize: Callable, dequantize: Callable) -> Format:
    return Format(name, (Part("", dtype, lambda c: c),), 32, quantize, dequantize)


_AFFINE = (
    Part(".scale", "U8", lambda c: c // GROUP),
    Part(".min", "U8", lambda c: c // GROUP),
    Part(".row", "F32", lambda c: 2),
)
_ALL = (
    _float("f32", "F32", lambda w: {"": w}, lambda parts: parts[""].astype(np.float32)),
    _float("f16", "F16", _quantize_f16, lambda parts: parts[""].astype(np.float32)),
    _float("bf16", "BF16", lambda w: {"": to_bfloat16(w)}, lambda parts: from_bfloat16(parts[""])),
    Format(
        "q8",
        (Part("", "I8", lambda c: c), Part(".scale", "F16", lambda c: c // GROUP)),
        16,
        _quantize_q8,
        _dequantize_q8,
    ),
    Format("q6", (Part("", "U8", lambda c: c * 3 // 4), *_AFFINE), 16, _quantize_q6, _dequantize_q6),
    Format("q4", (Part("", "U8", lambda c: c // 2), *_AFFINE), 16, _quantize_q4, _dequantize_q4),
    Format("ternary", (Part("", "U8", lambda c: c // 4), *_AFFINE), 16, _quantize_ternary, _dequantize_ternary),
)
FORMATS: Mapping[WeightFormat, Format] = MappingProxyType({format.name: format for format in _ALL})
PART_SUFFIXES: tuple[str, ...] = tuple(dict.fromkeys(part.suffix for format in _ALL for part in format.parts))
