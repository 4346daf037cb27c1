"""What a weight format has to bring: the kernels that read its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from svdengine.kernels.cpu.formats.sums import RowSums
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.matrix import ROWS
from svdengine.kernels.cpu.simd import store_f32, store_real, zero_f32
from svdengine.kernels.formats import WeightFormat

PANEL = 16  # rows of weights in a panel: one for each lane of a vector


@dataclass(frozen=True)
class FormatKernels:
    """The kernels of one format, compiled functions all. `matrix`: see matrix.py.

    An activation row is given twice: float32 at `x`, and at `quantized` as quantize.py lays it out. A format reads one
    of them, as its `activation_bits` say.
    """

    name: WeightFormat
    dot_row: Any  # (matrix, row, x, quantized, ahead) -> float32: a row times an activation row. ahead: bytes to what
    # memory will be asked for next
    dot_four: Any  # (matrix, r0..r3, n0..n3, x, quantized, out): out[0..4] = four rows times an activation row, bit for
    # bit as dot_row has them; n0..n3: rows that will be wanted next
    load_weights: Any  # (matrix, row, column) -> f32x16: 16 weights from a column that is a multiple of 16
    pack_panel: Any  # (matrix, first, start, stop, panel, staging): columns start..stop of 16 rows from `first` as the
    # tiles of tile.py want them for the format's activation_bits; rows beyond the last count as zeros
    pack_columns: Any  # (matrix, first, start, stop, panel): rows start..stop of 16 columns from `first`, as float32
    # Sums of weighted rows, by one of these two ways.
    sums: RowSums | None = None  # in integers
    add_four: Any = None  # (matrix, r0..r3, h0..h3, out, first, last): out[first..last] += h0 * row r0 + ... + h3 * r3


def four_by_one(dot_row: Any) -> Any:
    """`dot_four` for a format that gains nothing from reading four rows side by side."""

    @jit
    def dot_four(matrix, r0, r1, r2, r3, n0, n1, n2, n3, x, quantized, out):
        store_real(out, dot_row(matrix, r0, x, quantized, 0))
        store_real(out + 4, dot_row(matrix, r1, x, quantized, 0))
        store_real(out + 8, dot_row(matrix, r2, x, quantized, 0))
        store_real(out + 12, dot_row(matrix, r3, x, quantized, 0))

    return dot_four


def columns_by(load_weights: Any) -> Any:
    """`pack_columns` by a format's `load_weights`."""

    @jit
    def pack_columns(matrix, first, start, stop, panel):
        for row in range(start, stop):
            to = panel + 64 * (row - start)
            if row < matrix[ROWS]:
                store_f32(to, load_weights(matrix, row, first))
            else:
                store_f32(to, zero_f32())

    return pack_columns
