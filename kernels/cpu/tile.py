"""The register tiles of matrix-matrix products: 16 rows of weights by up to 8 rows of activations.

Weights are first packed into a panel of 16 rows (formats): lanes are rows, so that no sum runs across lanes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir
from numba.core import types

from svdengine.kernels.cpu import isa
from svdengine.kernels.cpu.amx import AMX, SUMS_BYTES, TILE_ROWS, emit_room, emit_tile_products, sums_at
from svdengine.kernels.cpu.dot import emit_products
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.simd import (
    F32,
    F32V,
    I8V,
    I32V,
    I64,
    ISA,
    address,
    fused,
    index,
    load,
    loop,
    operation,
    shuffle,
    splat,
    store,
)


def _at(builder, base, index_value, step):
    return builder.add(base, builder.mul(index_value, ir.Constant(I64, step)))


def _rows(builder, base, stride, count):
    return [builder.add(base, builder.mul(stride, ir.Constant(I64, t))) for t in range(count)]


def _store_all(builder, to, vectors):
    for i, vector in enumerate(vectors):
        store(builder, builder.add(to, ir.Constant(I64, 64 * i)), vector)


def _accumulate(builder, out, out_stride, totals):
    for target, total in zip(_rows(builder, out, out_stride, len(totals)), totals, strict=True):
        store(builder, target, builder.fadd(load(builder, target, F32V), total))


def integer_tile(count: int, *, amx: bool = False) -> Any:
    """out (count, 16) += panel (16 rows) times `count` quantised activation rows, maybe by AMX's tiles."""

    @operation(types.void, address, address, index, index, address, index)
    def tile(builder, panel, x, x_stride, columns, out, out_stride):
        """Panel: for each group of 32 columns, 16 scales, 16 minima, then 8 vectors in the order of `pack_words`."""
        groups = builder.lshr(columns, ir.Constant(I64, 5))
        rows = _rows(builder, x, x_stride, count)
        sums = builder.lshr(columns, ir.Constant(I64, 3))
        factors = builder.mul(columns, ir.Constant(I64, 2))
        room = emit_room(builder, SUMS_BYTES) if amx else None

        def body(group, totals):
            at = _at(builder, panel, group, 640)
            values = _at(builder, ir.Constant(I64, 0), group, 32)
            if amx:
                weights, first = builder.add(at, ir.Constant(I64, 128)), builder.add(x, values)
                emit_tile_products(builder, [weights], [first], x_stride, columns, room)
                dots = partial(sums_at(builder, room), 0)
            else:
                own = [builder.add(row, values) for row in rows]
                found = emit_products(builder, lambda step: load(builder, at, I8V, 128 + 64 * step), own, columns)
                dots = found.__getitem__
            scales, minima = load(builder, at, F32V), load(builder, at, F32V, 64)
            results = []
            for t in range(count):
                scale_at = builder.add(builder.add(rows[t], factors), _at(builder, ir.Constant(I64, 0), group, 4))
                a_scale = splat(builder, load(builder, scale_at, F32))
                a_sum = splat(builder, load(builder, builder.add(scale_at, sums), F32))
                product = builder.fmul(scales, a_scale)
                total = fused(builder, builder.sitofp(dots(t), F32V), product, totals[t])
                results.append(fused(builder, minima, a_sum, total))
            return results

        totals = loop(builder, groups, [ir.Constant(F32V, [0.0] * 16)] * count, body)
        _accumulate(builder, out, out_stride, totals)

    return tile


def float_tile(count: int) -> Any:
    """out (count, 16) += panel (16 rows, float32) times `count` float32 activation rows."""

    @operation(types.void, address, address, index, index, address, index)
    def tile(builder, panel, x, x_stride, columns, out, out_stride):
        """Panel: one vector of 16 rows a column."""
        rows = _rows(builder, x, x_stride, count)

        def body(four, totals):
            totals = list(totals)
            at = _at(builder, panel, four, 256)
            offset = _at(builder, ir.Constant(I64, 0), four, 16)
            for step in range(4):
                w = load(builder, at, F32V, 64 * step)
                for t in range(count):
                    scalar = load(builder, builder.add(rows[t], offset), F32, 4 * step)
                    totals[t] = fused(builder, w, splat(builder, scalar), totals[t])
            return totals

        quarter = builder.lshr(columns, ir.Constant(I64, 2))
        totals = loop(builder, quarter, [ir.Constant(F32V, [0.0] * 16)] * count, body)
        _accumulate(builder, out, out_stride, totals)

    return tile


def emit_transposed(builder, vectors):
    """16 vectors of 16 lanes, transposed: four by four inside parts of four lanes, and then the parts themselves."""

    def pair(a, b, lanes):
        return shuffle(builder, a, b, [part + lane for part in range(0, 16, 4) for lane in lanes])

    fours = []
    for i in range(0, 16, 4):
        a, b, c, d = vectors[i : i + 4]
        low, high = (0, 16, 1, 17), (2, 18, 3, 19)
        rounds = [(pair(a, b, low), pair(c, d, low)), (pair(a, b, high), pair(c, d, high))]
        fours.append([pair(x, y, lanes) for x, y in rounds for lanes in ((0, 1, 16, 17), (2, 3, 18, 19))])
    even, odd = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
    columns = [None] * 16
    for m in range(4):
        a, b, c, d = (four[m] for four in fours)
        for start, parts in ((0, even), (1, odd)):
            first = shuffle(builder, a, b, [*parts, *(16 + lane for lane in parts)])  # parts p and p + 2 of a, of b
            last = shuffle(builder, c, d, [*parts, *(16 + lane for lane in parts)])
            for half, lanes in ((0, [0, 1, 2, 3, 8, 9, 10, 11]), (2, [4, 5, 6, 7, 12, 13, 14, 15])):
                joined = shuffle(builder, first, last, [*lanes, *(16 + lane for lane in lanes)])
                columns[4 * (start + half) + m] = joined
    return columns


@operation(types.void, address, index, address)
def transpose_words(builder, source, stride, to):
    """16 rows of 16 4-byte words, `stride` bytes apart, to 16 vectors whose lanes are the rows."""
    rows = [load(builder, row, I32V) for row in _rows(builder, source, stride, 16)]
    _store_all(builder, to, emit_transposed(builder, rows))


def emit_panel_order(builder, words):
    """Vectors whose lanes are rows, a word of 4 columns each, in the order in which `emit_products` reads them.

    For smmla the words of a pair lie side by side, first those of rows 0..7: 8 columns of a row are 8 bytes.
    """
    if ISA != isa.I8MM:
        return words
    vectors = []
    for a, b in zip(words[::2], words[1::2], strict=True):
        for first in (0, 8):
            lanes = [lane for row in range(first, first + 8) for lane in (row, 16 + row)]
            vectors.append(shuffle(builder, a, b, lanes))
    return vectors


@jit
def place_of(word, lane):
    """Bytes from where a panel's words begin to one of a row, in the order of panels."""
    if PAIRED:
        return 128 * (word // 2) + 8 * lane + 4 * (word % 2)
    return 64 * word + 4 * lane


@operation(types.void, address, index, address)
def pack_words(builder, source, stride, to):
    """As `transpose_words`, in the order of panels."""
    rows = [load(builder, row, I32V) for row in _rows(builder, source, stride, 16)]
    _store_all(builder, to, emit_panel_order(builder, emit_transposed(builder, rows)))


PAIRED = ISA == isa.I8MM
# Where a vector takes two of sixteen registers, tiles of integers hold 2 rows: more were slower.
_WIDE = isa.wide(ISA)
integer_tile_2 = integer_tile(2)
amx_tile = integer_tile(TILE_ROWS, amx=True) if AMX else integer_tile_2
integer_tile_4, integer_tile_8 = (integer_tile(t) if _WIDE else integer_tile_2 for t in (4, 8))
_FIVE, _THREE = (5, 3) if _WIDE else (1 << 40, 1 << 40)  # rows from which a tile of 8, of 4 is taken
float_tile_8, float_tile_4, float_tile_2 = float_tile(8), float_tile(4), float_tile(2)


@jit
def integer_tiles(panel, x, x_stride, columns, out, out_stride, n, tiles):
    """out (n, 16) += panel times n quantised rows. Rows up to the next tile size may be read and written.

    tiles: whether AMX's are in use (amx.py).
    """
    t = 0
    while AMX and tiles and t + TILE_ROWS <= n:
        amx_tile(panel, x + t * x_stride, x_stride, columns, out + t * out_stride, out_stride)
        t += TILE_ROWS
    while t < n:
        if n - t >= _FIVE:
            integer_tile_8(panel, x + t * x_stride, x_stride, columns, out + t * out_stride, out_stride)
            t += 8
        elif n - t >= _THREE:
            integer_tile_4(panel, x + t * x_stride, x_stride, columns, out + t * out_stride, out_stride)
            t += 4
        else:
            integer_tile_2(panel, x + t * x_stride, x_stride, columns, out + t * out_stride, out_stride)
            t += 2


@jit
def float_tiles(panel, x, x_stride, columns, out, out_stride, n):
    """As `integer_tiles`, for float32 panels and rows."""
    t = 0
    while t < n:
        if n - t > 4:
            float_tile_8(panel, x + t * x_stride, x_stride, columns, out + t * out_stride, out_stride)
            t += 8
        elif n - t > 2:
            float_tile_4(panel, x + t * x_stride, x_stride, columns, out + t * out_stride, out_stride)
            t += 4
        else:
            float_tile_2(panel, x + t * x_stride, x_stride, columns, out + t * out_stride, out_stride)
            t += 2
