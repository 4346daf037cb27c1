"""Products of interleaved matrices (panels.py) with one to eight activation rows at once.

Every row of activations takes the same steps however many there are, so that a row gets the same bits in any company.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir
from numba.core import types

from svdengine.kernels.cpu import isa
from svdengine.kernels.cpu.amx import (
    AMX,
    GROUP_BYTES,
    SUMS_BYTES,
    TILE_ROWS,
    emit_room,
    emit_tile_products,
    emit_unpacked,
    end_tiles,
    start_tiles,
    sums_at,
)
from svdengine.kernels.cpu.dot import BIAS, emit_products
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.matrix import COLUMNS, DATA, FORMAT, MIN, PANEL_CODES, ROW, SCALE
from svdengine.kernels.cpu.pieces import piece
from svdengine.kernels.cpu.simd import (
    F32,
    F32V,
    I8,
    I8V,
    I16,
    I32,
    I64,
    ISA,
    address,
    emit_f16,
    emit_prefetch,
    fused,
    index,
    load,
    loop,
    operation,
    splat,
    store,
)
from svdengine.kernels.formats import WeightFormat

AHEAD = 6144  # bytes ahead of a panel's values that memory is asked for
_NEVER = 1 << 40
_ROW_BYTES: dict[WeightFormat, int] = {"q8": 64, "q6": 48, "q4": 32}  # of 64 columns


def _shifted(builder, vector, right):
    """Bytes shifted right; what crosses into a byte is left to a mask."""
    if not right:
        return vector
    wide = ir.VectorType(I16, 32)
    shifted = builder.lshr(builder.bitcast(vector, wide), ir.Constant(wide, [right] * 32))
    return builder.bitcast(shifted, I8V)


def _masked(builder, vector, mask):
    return builder.and_(vector, ir.Constant(I8V, [mask] * 64))


def _emit_weights(weight_format, builder, at, group, step):
    """16 rows x 4 columns of a block of 64: those of word `step` of a group of 32, as `emit_dot` wants them.

    In the order of smmla (tile.py) a pair of words is 8 rows x 8 columns, and then those of the other 8 rows.
    """
    if weight_format == "q8":
        return load(builder, at, I8V, 64 * (8 * group + step))
    halves = _masked(builder, _shifted(builder, load(builder, at, I8V, 64 * step), 4 * group), 15)
    if weight_format == "q4":
        return halves
    word = 8 * group + step
    pairs = load(builder, at, I8V, 64 * (8 + word % 4))
    right = 2 * (word // 4) - 4  # the pair moves to the bits above the half
    if right >= 0:
        pairs = _shifted(builder, pairs, right)
    else:
        wide = ir.VectorType(I16, 32)
        pairs = builder.bitcast(builder.shl(builder.bitcast(pairs, wide), ir.Constant(wide, [-right] * 32)), I8V)
    return builder.or_(halves, _masked(builder, pairs, 48))


def panel_tile(weight_format: WeightFormat, count: int, *, amx: bool = False) -> Any:
    """out (count, 16) = bias + a panel (16 rows) times `count` quantised activation rows, maybe by AMX's tiles."""
    affine = weight_format != "q8"
    block_bytes, scale_bytes = 16 * _ROW_BYTES[weight_format], 16 if affine else 32  # of a block, of a group

    def emit_dots(builder, at, x, columns, group):
        """(count) sums of a group's integer products, 16 int32 each."""
        own = [builder.add(row, ir.Constant(I64, 32 * group)) for row in x]
        return emit_products(builder, partial(_emit_weights, weight_format, builder, at, group), own, columns)

    def emit_tiles(builder, at, x, stride, columns, sums, unpacked):
        """Have AMX's tiles store the sums of a block at `sums`; at, x: of its weights, and of its first activations."""
        if weight_format != "q8":
            words = [_emit_weights(weight_format, builder, at, group, step) for group in range(2) for step in range(8)]
            at = emit_unpacked(builder, unpacked, words)
        weights = [builder.add(at, ir.Constant(I64, GROUP_BYTES * group)) for group in range(2)]
        planes = [builder.add(x, ir.Constant(I64, 32 * group)) for group in range(2)]
        emit_tile_products(builder, weights, planes, stride, columns, sums)

    def emit_level(builder, at, unit):
        """A group's scales, or minima, of 16 rows."""
        return builder.fmul(builder.uitofp(load(builder, at, ir.VectorType(I8, 16)), F32V), unit)

    @operation(types.void, address, address, address, address, address, index, index, address, address, index)
    def tile(builder, values, scales, minima, units, x, x_stride, columns, bias, out, out_stride):
        rows = [builder.add(x, builder.mul(x_stride, ir.Constant(I64, t))) for t in range(count)]
        factors = [builder.add(row, builder.mul(columns, ir.Constant(I64, 2))) for row in rows]
        eighth = builder.lshr(columns, ir.Constant(I64, 3))  # bytes of one factor of every group
        offsets = builder.mul(eighth, ir.Constant(I64, 3))
        unit = load(builder, units, F32V) if affine else None
        least = builder.fneg(load(builder, units, F32V, 64)) if affine else None
        blocks = builder.lshr(columns, ir.Constant(I64, 6))
        sums_room, unpacked = (
            (emit_room(builder, 2 * SUMS_BYTES), emit_room(builder, 2 * GROUP_BYTES)) if amx else (None, None)
        )

        def emit_block(block):
            """By tiles: the sums of a block, which the next round of the loop scales."""
            at = builder.add(values, builder.mul(block, ir.Constant(I64, block_bytes)))
            half = builder.and_(block, ir.Constant(I64, 1))
            sums = builder.add(sums_room, builder.mul(half, ir.Constant(I64, SUMS_BYTES)))
            first = builder.add(x, builder.mul(block, ir.Constant(I64, 64)))
            emit_tiles(builder, at, first, x_stride, columns, sums, unpacked)

        def body(block, totals):
            at = builder.add(values, builder.mul(block, ir.Constant(I64, block_bytes)))
            for line in range(0, block_bytes, 64):
                emit_prefetch(builder, builder.add(at, ir.Constant(I64, AHEAD + line)))
            x_at = builder.mul(block, ir.Constant(I64, 64))
            if amx:
                following = builder.add(block, ir.Constant(I64, 1))
                last = builder.icmp_signed("==", following, blocks)
                emit_block(builder.select(last, block, following))
                half = builder.and_(block, ir.Constant(I64, 1))
                stored = sums_at(builder, builder.add(sums_room, builder.mul(half, ir.Constant(I64, SUMS_BYTES))))
            for group in range(2):
                if amx:
                    dots = partial(stored, group)
                else:  # one group after the other: the registers hold no more
                    own = [builder.add(row, x_at) for row in rows]
                    dots = emit_dots(builder, at, own, columns, group).__getitem__
                place = builder.add(builder.mul(block, ir.Constant(I64, 2)), ir.Constant(I64, group))
                of_group = builder.mul(place, ir.Constant(I64, scale_bytes))
                scales_at, minima_at = builder.add(scales, of_group), builder.add(minima, of_group)
                scale = emit_level(builder, scales_at, unit) if affine else emit_f16(builder, scales_at)
                low = emit_level(builder, minima_at, least) if affine else None
                results = []
                for t in range(count):
                    factor = builder.add(factors[t], builder.mul(place, ir.Constant(I64, 4)))
                    sums = dots(t)
                    if BIAS and not affine:
                        offset = splat(builder, load(builder, builder.add(factor, offsets), I32))
                        sums = builder.add(sums, offset)
                    product = builder.fmul(scale, splat(builder, load(builder, factor, F32)))
                    total = fused(builder, builder.sitofp(sums, F32V), product, totals[t])
                    if affine:
                        a_sum = splat(builder, load(builder, builder.add(factor, eighth), F32))
                        total = fused(builder, low, a_sum, total)
                    results.append(total)
                totals = results
            return totals

        if amx:
            emit_block(ir.Constant(I64, 0))
        totals = loop(builder, blocks, [ir.Constant(F32V, [0.0] * 16)] * count, body)
        added = load(builder, bias, F32V)
        for t, total in enumerate(totals):
            to = builder.add(out, builder.mul(out_stride, ir.Constant(I64, t)))
            store(builder, to, builder.fadd(total, added))

    return tile


def _by_rows(weight_format: WeightFormat) -> Any:
    """A panel times n activation rows. Rows up to the next tile size may be read and written.

    The largest tile is what the registers hold: where a vector takes two of sixteen, 2 rows. With AVX-512 it is 8 rows,
    and 4 where levels have to be unpacked. `tiles`: whether AMX's are in use (amx.py).
    """
    widest = 2 if not isa.wide(ISA) else 8 if weight_format == "q8" else 4
    tile_1, tile_2 = panel_tile(weight_format, 1), panel_tile(weight_format, 2)
    tile_4 = panel_tile(weight_format, 4) if widest >= 4 else tile_2
    tile_8 = panel_tile(weight_format, 8) if widest >= 8 else tile_4
    eight, three = 8 if widest >= 8 else _NEVER, 3 if widest >= 4 else _NEVER  # rows from which a tile is taken

    by_tiles = panel_tile(weight_format, TILE_ROWS, amx=True) if AMX else tile_1

    @jit
    def times_rows(values, scales, minima, units, x, x_stride, columns, bias, out, out_stride, n, tiles):
        t = 0
        while AMX and tiles and t < n:
            at = min(t, n - TILE_ROWS)  # the last tile may make rows again, to the same bits
            rows, to = x + at * x_stride, out + at * out_stride
            by_tiles(values, scales, minima, units, rows, x_stride, columns, bias, to, out_stride)
            t += TILE_ROWS
        while t < n:
            rows, to = x + t * x_stride, out + t * out_stride
            if n - t >= eight:
                tile_8(values, scales, minima, units, rows, x_stride, columns, bias, to, out_stride)
                t += 8
            elif n - t >= three:
                tile_4(values, scales, minima, units, rows, x_stride, columns, bias, to, out_stride)
                t += 4
            elif n - t >= 2:
                tile_2(values, scales, minima, units, rows, x_stride, columns, bias, to, out_stride)
                t += 2
            else:
                tile_1(values, scales, minima, units, rows, x_stride, columns, bias, to, out_stride)
                t += 1

    return times_rows


q8_rows, q6_rows, q4_rows = _by_rows("q8"), _by_rows("q6"), _by_rows("q4")
_Q8, _Q6 = PANEL_CODES["q8"], PANEL_CODES["q6"]


@piece
def multiply_panels(matrix, bias, quantized, stride, n, out, out_stride, first, last):
    """out[:, first..last] = n quantised rows times rows first..last of an interleaved matrix, plus bias.

    first is a multiple of 16; up to the next multiple of 16 after `last`, and of 4 after n, may be read and written.
    """
    columns, code = matrix[COLUMNS], matrix[FORMAT]
    groups = columns // 32
    tiles = start_tiles(n)
    for row in range(first, last, 16):
        panel = row // 16
        at, to = bias + 4 * row, out + 4 * row
        if code == _Q8:
            values, scales = matrix[DATA] + row * columns, matrix[SCALE] + panel * groups * 32
            q8_rows(values, scales, scales, scales, quantized, stride, columns, at, to, out_stride, n, tiles)
        else:
            scales, minima = matrix[SCALE] + row * groups, matrix[MIN] + row * groups
            units = matrix[ROW] + 128 * panel
            if code == _Q6:
                values = matrix[DATA] + row * (columns // 4 * 3)
                q6_rows(values, scales, minima, units, quantized, stride, columns, at, to, out_stride, n, tiles)
            else:
                values = matrix[DATA] + row * (columns // 2)
                q4_rows(values, scales, minima, units, quantized, stride, columns, at, to, out_stride, n, tiles)
    end_tiles(tiles)
