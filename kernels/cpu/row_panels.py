"""Products of rows that are read in place with a few activation rows: 16 rows at a time are interleaved on the way.

Matrices whose rows may be skipped cannot lie interleaved in memory (panels.py). Where a step reads all of their rows
for several activation rows, interleaving them into a panel that stays in the cache costs less than a sum across lanes
for each product.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import types

from svdengine.kernels.cpu.amx import end_tiles, start_tiles
from svdengine.kernels.cpu.dot import emit_bias
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.matrix import COLUMNS, DATA, FORMAT, MIN, PANEL_ROWS, ROW, ROW_BYTES, SCALE
from svdengine.kernels.cpu.panel_product import q4_rows, q6_rows, q8_rows
from svdengine.kernels.cpu.pieces import piece
from svdengine.kernels.cpu.simd import (
    I8,
    I8V,
    I16,
    I32V,
    I64,
    address,
    emit_prefetch,
    index,
    load,
    load_real,
    operation,
    store,
    store_real,
)
from svdengine.kernels.cpu.tile import emit_panel_order, emit_transposed
from svdengine.kernels.formats import FORMATS

_Q8, _Q6, _Q4 = (FORMATS[name].code for name in ("q8", "q6", "q4"))
_LEAST = 16  # groups in a row: scales are interleaved 16 at a time


def _emit_rows(builder, source, stride, kind):
    return [load(builder, builder.add(source, builder.mul(stride, ir.Constant(I64, i))), kind) for i in range(16)]


def _emit_stored(builder, to, vectors, size):
    for i, vector in enumerate(vectors):
        store(builder, builder.add(to, ir.Constant(I64, size * i)), vector)


def _words(biased):
    @operation(types.void, address, index, address, index)
    def interleave_words(builder, source, stride, to, ahead):
        """16 words of each of 16 rows, side by side; memory is asked for the words that lie `ahead` bytes on."""
        rows = _emit_rows(builder, source, stride, I32V)
        for i in range(16):
            at = builder.add(source, builder.mul(stride, ir.Constant(I64, i)))
            emit_prefetch(builder, builder.add(at, ahead))
        if biased:
            rows = [builder.bitcast(emit_bias(builder, builder.bitcast(row, I8V)), I32V) for row in rows]
        _emit_stored(builder, to, emit_panel_order(builder, emit_transposed(builder, rows)), 64)

    return interleave_words


def _levels(kind):
    @operation(types.void, address, index, address)
    def interleave_levels(builder, source, stride, to):
        """16 levels of each of 16 rows, side by side."""
        small = ir.VectorType(kind, 16)
        rows = [builder.zext(row, I32V) for row in _emit_rows(builder, source, stride, small)]
        columns = [builder.trunc(vector, small) for vector in emit_transposed(builder, rows)]
        _emit_stored(builder, to, columns, 2 * kind.width)

    return interleave_levels


interleave_words, interleave_biased = _words(False), _words(True)
interleave_halves, interleave_bytes = _levels(I16), _levels(I8)


@jit
def can_interleave(matrix):
    """Whether the format is one that is multiplied in panels, and its rows are long enough to interleave them."""
    code = matrix[FORMAT]
    return (code == _Q8 or code == _Q6 or code == _Q4) and matrix[COLUMNS] >= 32 * _LEAST


@piece
def multiply_in_panels(matrix, bias, quantized, stride, n, out, out_stride, first, last, scratch):
    """out[:, first..last] = n quantised rows times rows first..last of a matrix, plus bias; whole panels of 16 rows.

    Outputs up to the next multiple of 4 after n may be written. scratch: 16 rows as they are stored, and 1 KiB.
    """
    columns, code, size = matrix[COLUMNS], matrix[FORMAT], matrix[ROW_BYTES]
    groups = columns // 32
    units, values = scratch, scratch + 128
    scales = values + PANEL_ROWS * size
    minima = scales + PANEL_ROWS * groups
    tiles = start_tiles(n)
    for row in range(first, last, PANEL_ROWS):
        source = matrix[DATA] + row * size
        ahead = PANEL_ROWS * size if row + PANEL_ROWS < last else 0
        for start in range(0, size, 64):
            at = min(start, size - 64)  # the last words of a row may be interleaved twice
            if code == _Q8:
                interleave_biased(source + at, size, values + 16 * at, ahead)
            else:
                interleave_words(source + at, size, values + 16 * at, ahead)
        for start in range(0, groups, 16):
            group = min(start, groups - 16)
            at = row * groups + group
            if code == _Q8:
                interleave_halves(matrix[SCALE] + 2 * at, 2 * groups, scales + 32 * group)
            else:
                interleave_bytes(matrix[SCALE] + at, groups, scales + 16 * group)
                interleave_bytes(matrix[MIN] + at, groups, minima + 16 * group)
        add, to = bias + 4 * row, out + 4 * row
        if code == _Q8:
            q8_rows(values, scales, scales, scales, quantized, stride, columns, add, to, out_stride, n, tiles)
            continue
        for lane in range(PANEL_ROWS):
            unit = matrix[ROW] + 8 * (row + lane)
            store_real(units + 4 * lane, load_real(unit))
            store_real(units + 64 + 4 * lane, load_real(unit + 4))
        if code == _Q6:
            q6_rows(values, scales, minima, units, quantized, stride, columns, add, to, out_stride, n, tiles)
        else:
            q4_rows(values, scales, minima, units, quantized, stride, columns, add, to, out_stride, n, tiles)
    end_tiles(tiles)
