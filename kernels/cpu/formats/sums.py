"""Sums of weighted rows in integers: out += h0 * row0 + h1 * row1 + ..., for formats of whole levels with scales.

Of a row i and a group g of 32 columns, h[i] * scale[i, g] is rounded to 16 bits, in the same unit for all rows of a sum
(kernels/cpu/rows.py chooses it). So all products of a column are added up as integers, which has no rounding: the sum
does not depend on the order of the rows, on which others are added at once, or on rows whose weight is 0.

Four rows are interleaved byte by byte in registers, so that one lane of an integer dot product is a column. Sums stay
in the order that this leaves in each block of 64 columns until `finish` brings them back to the columns' own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import types

from svdengine.kernels.cpu.dot import BIAS, emit_dot
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.simd import (
    F32,
    F32V,
    I8V,
    I32,
    I32V,
    I64,
    address,
    call,
    emit_prefetch,
    f32x16,
    fused,
    index,
    load,
    loop,
    operation,
    real,
    shuffle,
    splat,
    store,
)

ROWS = 16  # added at once, at most
_THREE = ir.Constant(I64, 3)
_NO_SUMS = ir.Constant(I32V, [0] * 16)


class RowSums(NamedTuple):
    """What a format brings for sums in integers."""

    # (matrix, rows, weights, planes, stride, side, first, last): the weights of four rows, their numbers at `rows`, for
    # groups first..last, in two planes that are `stride` bytes apart. weights: address of h / unit. side: by group what
    # `finish` takes off, to which the four rows' part is added
    scale_four: Any
    # (matrix, rows, ahead, planes, stride, sums, fours, blocks): sums += so many times four rows. rows, ahead: the
    # addresses of what is added and of what memory is asked for
    add_many: Any
    # (matrix, out, sums, side, unit, blocks): out += unit * (sums - what `side` takes off); sums become 0
    finish: Any


def _interleaved(builder: Any, rows: list[Any]) -> list[Any]:
    """Bytes of four rows, 64 each, side by side: lane 4 l + j of the k-th vector is column 16 l + 4 k + j."""

    def unpack(a: Any, b: Any, size: int, upper: bool) -> Any:
        lanes = []
        for lane in range(0, 64, 16):
            for item in range(8 * upper, 8 * upper + 8, size):
                for source in (0, 64):
                    lanes += [source + lane + item + byte for byte in range(size)]
        return shuffle(builder, a, b, lanes)

    pairs = [[unpack(rows[i], rows[i + 1], 1, upper) for i in (0, 2)] for upper in (False, True)]
    return [unpack(a, b, 2, upper) for a, b in pairs for upper in (False, True)]


@operation(f32x16, f32x16, f32x16, f32x16, f32x16, address, address)
def pack_planes(builder, p0, p1, p2, p3, high, low):
    """Store four rows' weights of 16 groups, rounded, as two planes of int8; a dword holds a group's of all four.

    Returns the sums of what is stored, by group.
    """

    def constant(value: int) -> Any:
        return ir.Constant(I32V, [value] * 16)

    highs, lows, total = _NO_SUMS, _NO_SUMS, _NO_SUMS
    for i, p in enumerate((p0, p1, p2, p3)):
        value = builder.fptosi(call(builder, "llvm.rint.v16f32", F32V, [p]), I32V)
        top = builder.ashr(builder.add(value, constant(128)), constant(8))
        rest = builder.sub(value, builder.shl(top, constant(8)))
        # -128 would overflow where weights lend the other side their sign.
        rest = builder.select(builder.icmp_signed(">", rest, constant(-127)), rest, constant(-127))
        total = builder.add(total, builder.add(builder.shl(top, constant(8)), rest))
        shift = constant(8 * i)
        highs = builder.or_(highs, builder.shl(builder.and_(top, constant(255)), shift))
        lows = builder.or_(lows, builder.shl(builder.and_(rest, constant(255)), shift))
    store(builder, high, highs)
    store(builder, low, lows)
    return builder.sitofp(total, F32V)


@operation(types.void, address, f32x16)
def add_whole(builder, at, value):
    """Add 16 whole numbers to 16 int32."""
    store(builder, at, builder.add(load(builder, at, I32V), builder.fptosi(value, I32V)))


def adding(size: int, emit_block: Any) -> Any:
    """`add_many` of a format whose blocks of 64 columns have `size` bytes, read by emit_block(builder, at)."""
    lines = 4 if size > 32 else 4 * size // 64  # to ask for at each block and four rows, in turn if not of all

    @operation(types.void, address, address, address, index, address, index, index)
    def of_blocks(builder, rows, ahead, planes, stride, sums, fours, blocks):
        def block(b, _):
            at = builder.mul(b, ir.Constant(I64, size))
            turn = builder.shl(builder.and_(builder.mul(b, ir.Constant(I64, lines)), ir.Constant(I64, 3)), _THREE)
            own = builder.add(planes, builder.mul(b, ir.Constant(I64, 8)))

            def four(f, products):
                listed, wanted = (builder.add(start, builder.mul(f, ir.Constant(I64, 32))) for start in (rows, ahead))
                places = [builder.add(load(builder, listed, I64, 8 * i), at) for i in range(4)]
                weights = _interleaved(builder, [emit_block(builder, place) for place in places])
                for i in range(lines):
                    emit_prefetch(builder, builder.add(load(builder, builder.add(wanted, turn), I64, 8 * i), at))
                place, results = builder.add(own, builder.mul(f, builder.shl(stride, ir.Constant(I64, 1)))), []
                for plane in range(2):
                    pair = load(builder, place, ir.VectorType(I32, 2))
                    place = builder.add(place, stride)
                    spread = builder.bitcast(shuffle(builder, pair, pair, [0] * 8 + [1] * 8), I8V)
                    totals = products[4 * plane : 4 * plane + 4]
                    results += [emit_dot(builder, t, w, spread) for t, w in zip(totals, weights, strict=True)]
                return results

            products = loop(builder, fours, [_NO_SUMS] * 8, four)
            to = builder.add(sums, builder.mul(b, ir.Constant(I64, 256)))
            for k in range(4):
                both = builder.add(builder.shl(products[k], ir.Constant(I32V, [8] * 16)), products[4 + k])
                place = builder.add(to, ir.Constant(I64, 64 * k))
                store(builder, place, builder.add(load(builder, place, I32V), both))
            return []

        loop(builder, blocks, [], block)

    @jit
    def add_many(matrix, rows, ahead, planes, stride, sums, fours, blocks):
        of_blocks(rows, ahead, planes, stride, sums, fours, blocks)

    return add_many


def finishing(affine: bool) -> Any:
    """`finish`: `side` has the sums of all weights, in int32, or of affine formats those of the weighted minima."""

    @operation(types.void, address, address, address, real, index)
    def of_blocks(builder, out, sums, side, unit, blocks):
        units = splat(builder, unit)

        def block(b, _):
            at = builder.mul(b, ir.Constant(I64, 256))
            found = [load(builder, builder.add(sums, at), I32V, 64 * k) for k in range(4)]
            groups = builder.add(side, builder.mul(b, ir.Constant(I64, 8)))
            for v in range(4):
                lanes = [16 * half + 4 * v + j for half in range(2) for j in range(4)]
                halves = [shuffle(builder, found[k], found[k + 1], lanes) for k in (0, 2)]
                total = shuffle(builder, *halves, list(range(16)))
                if not affine and BIAS:
                    offset = builder.mul(load(builder, groups, I32, 4 * (v // 2)), ir.Constant(I32, BIAS))
                    total = builder.sub(total, splat(builder, offset))
                to = builder.add(builder.add(out, at), ir.Constant(I64, 64 * v))
                value = builder.sitofp(total, F32V)
                if affine:
                    value = builder.fsub(value, splat(builder, load(builder, groups, F32, 4 * (v // 2))))
                store(builder, to, fused(builder, value, units, load(builder, to, F32V)))
                store(builder, builder.add(builder.add(sums, at), ir.Constant(I64, 64 * v)), _NO_SUMS)
            return []

        loop(builder, blocks, [], block)

    @jit
    def finish(matrix, out, sums, side, unit, blocks):
        of_blocks(out, sums, side, unit, blocks)

    return finish
