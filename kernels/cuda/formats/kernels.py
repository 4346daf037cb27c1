"""What a weight format has to bring: how a thread reads a chunk of a row, and what it makes of it.

A chunk is what a thread reads at once of a row, as uint32 words in registers: some columns, in fours that need not be
neighbours. Activations and sums are float32. A kernel takes a matrix as four arrays, `MATRIX_PARTS`; those that the
format lacks are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from svdengine.kernels.cuda.formats.fours import NO_SUMS
from svdengine.kernels.cuda.formats.tiles import TileKernels
from svdengine.kernels.cuda.intrinsics import jit
from svdengine.kernels.formats import FORMATS, WeightFormat

# Of a kernel's parameter: the suffix of the part (kernels/formats.py) that it holds, and as what items it is read.
MATRIX_PARTS = MappingProxyType({"words": "", "scale": ".scale", "low": ".min", "row": ".row"})
_TYPES = MappingProxyType({"words": "uint32", "scale": "uint8", "low": "uint8", "row": "float32"})


@jit(device=True)
def unchanged(total):
    """Sums that are those of the columns as they are."""
    return total


@dataclass(frozen=True)
class FormatKernels:
    """The kernels of one format, device functions all.

    `words`, `scale`, `low` and `row` are the matrix, r is a row's number in it, `stride` its columns as stored, j the
    number of a chunk in its row, and w the words of a chunk.
    """

    name: WeightFormat
    chunk_columns: int  # of which a chunk has one weight each: a multiple of 4 that divides 64
    load_chunk: Any  # (words, base, j) -> w: chunk j of the row that begins at word `base`
    dot_chunk: Any  # (w, scale, low, row, r, stride, x, at, j) -> float32: the chunk times the activation row that
    # begins at item `at` of x, float32 seen as words
    add_chunk: Any  # (total, h, w, scale, low, row, r, stride, j) -> total + h * the chunk; sums are kept by fours,
    # and behind those of the columns there may be others, which `finish` takes into account
    column_of: Any  # (j, k) -> the first column of the k-th four of chunk j
    weight: Any  # (words, scale, low, row, r, column, stride) -> float32: a single weight
    most_sums: int  # rows of activations for which a thread can hold the sums of a chunk's columns in registers
    at_once: int = 4  # chunks of a row whose loads are on their way at once, 4 or 2: as many as registers hold
    listed_at_once: int = 4  # the same of listed rows (rows.py), whose kernels have more in registers
    other_sums: int = 0  # fours behind those of the columns
    finish: Any = unchanged  # (total) -> the sums of the columns, once all is added
    types: Mapping[str, str] = field(default_factory=dict)  # of parameters whose items are not those of `_TYPES`
    library_type: Any = None  # NumPy's, of words that the vendor's library multiplies as they are stored
    tiles: TileKernels | None = None  # for products on tensor cores

    @property
    def chunk_words(self) -> int:
        """Words that a row has for each of its chunks."""
        return FORMATS[self.name].row_bytes(self.chunk_columns) // 4

    @property
    def nothing(self) -> tuple[Any, ...]:
        """What sums over `add_chunk` start from."""
        return (NO_SUMS,) * (self.chunk_columns // 4 + self.other_sums)

    def type_of(self, parameter: str) -> str:
        """The type of the items of one of `MATRIX_PARTS`."""
        return self.types.get(parameter, _TYPES[parameter])

    def parameters(self, prefix: str = "") -> str:
        """The parameters of a kernel that are a matrix, for `kernel`."""
        return ", ".join(f"{self.type_of(parameter)}* {prefix}{parameter}" for parameter in MATRIX_PARTS)
