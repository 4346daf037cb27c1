"""The register tiles of matrix-matrix products: 16 rows of weights by up to 8 rows of activations.

Weights are first packed into a panel of 16 rows (formats): lanes are rows, so that no sum runs across lanes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir
from numba.core import types

from svdengine.kernels.cpu import isa
from svdengine.kernels.cpu.amx import AMX, SUMS_BYTES, TILE_ROWS, emit_products, emit_room, sums_at
from svdengine.kernels.cpu.dot import emit_dot
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.simd import (
    F32,
    F32V,
    I8V,
    I32,
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


def _accumulate(builder, out, out_stride, totals):
    for target, total in zip(_rows(builder, out, out_stride, len(totals)), totals, strict=True):
        store(builder, target, builder.fadd(load(builder, target, F32V), total))


def integer_tile(count: int, *, amx: bool = False) -> Any:
    """out (count, 16) += panel (16 rows) times `count` quantised activation rows, maybe by AMX's tiles."""

    def emit_dots(builder, weights, high, low):
        """A function of row that gives the 16 int32 sums of a group's products."""
        dots, low_dots = ([ir.Constant(I32V, [0] * 16)] * count for _ in range(2))
        for step in range(8):
            w = load(builder, weights, I8V, 64 * step)
            for t in range(count):
                four = load(builder, high[t], I32, 4 * step)
                dots[t] = emit_dot(builder, dots[t], w, builder.bitcast(splat(builder, four), I8V))
                four = load(builder, low[t], I32, 4 * step)
                low_dots[t] = emit_dot(builder, low_dots[t], w, builder.bitcast(splat(builder, four), I8V))
        eight = ir.Constant(I32V, [8] * 16)
        return lambda t: builder.add(builder.shl(dots[t], eight), low_dots[t])

    @operation(types.void, address, address, index, index, address, index)
    def tile(builder, panel, x, x_stride, columns, out, out_stride):
        """Panel: for each group of 32 columns, 16 scales, 16 minima, then 8 vectors of 16 rows x 4 columns."""
        groups = builder.lshr(columns, ir.Constant(I64, 5))
        rows = _rows(builder, x, x_stride, count)
        sums = builder.lshr(columns, ir.Constant(I64, 3))
        factors = builder.mul(columns, ir.Constant(I64, 2))
        low_rows = [builder.add(row, columns) for row in rows]
        room = emit_room(builder, SUMS_BYTES) if amx else None

        def body(group, totals):
            at = _at(builder, panel, group, 640)
            values = _at(builder, ir.Constant(I64, 0), group, 32)
            weights, first = builder.add(at, ir.Constant(I64, 128)), builder.add(x, values)
            if amx:
                emit_products(builder, [weights], [first], x_stride, columns, room)
                dots = partial(sums_at(builder, room), 0)
            else:
                planes = [[builder.add(row, values) for row in part] for part in (rows, low_rows)]
                dots = emit_dots(builder, weights, *planes)
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
    for i, vector in enumerate(emit_transposed(builder, rows)):
        store(builder, builder.add(to, ir.Constant(I64, 64 * i)), vector)


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
