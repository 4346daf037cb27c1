"""Predictor scores of 16 neurons at a time, and the list of those that are positive.

The predictor lies in panels of 16 neurons whose lanes are the neurons (score_panels.py): no sum runs across lanes, and
a comparison and a compressing store make the list.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from svdengine.kernels.cpu.dot import BIAS, emit_dot, emit_one_bit, emit_two_bits
from svdengine.kernels.cpu.score_panels import FACTOR_BYTES, RESIDUAL_BYTES
from svdengine.kernels.cpu.simd import (
    F16,
    F32,
    F32V,
    I8V,
    I32,
    I32V,
    I64,
    address,
    call,
    declare,
    f32x16,
    fused,
    half_to_float,
    index,
    load,
    loop,
    operation,
    splat,
)
from svdengine.kernels.formats import GROUP
from svdengine.kernels.lowbit import BLOCK


def _at(builder, base, i, step):
    return builder.add(base, builder.mul(i, ir.Constant(I64, step)))


def _scales(builder, at):
    return half_to_float(builder, load(builder, at, ir.VectorType(F16, 16)))


def _float(builder, at, offset=0):
    return splat(builder, load(builder, at, F32, offset))


def _four(builder, at, offset):
    """Four neighbouring activations, for every neuron."""
    return builder.bitcast(splat(builder, load(builder, at, I32, offset)), I8V)


@operation(f32x16, f32x16, address, index, address)
def add_factor_scores(builder, total, panel, groups, z):
    """total + A z of a panel; z: a quantised row of `groups` (at least 1) groups of 32, both planes."""
    columns = builder.mul(groups, ir.Constant(I64, GROUP))
    low = builder.add(z, columns)
    factors = builder.add(low, columns)
    sums = builder.add(factors, builder.mul(groups, ir.Constant(I64, 4)))

    def body(group, totals):
        at = _at(builder, panel, group, FACTOR_BYTES)
        high_at, low_at = _at(builder, z, group, GROUP), _at(builder, low, group, GROUP)
        high_dots, low_dots = (ir.Constant(I32V, [0] * 16) for _ in range(2))
        for step in range(GROUP // 4):
            w = load(builder, at, I8V, 32 + 64 * step)
            high_dots = emit_dot(builder, high_dots, w, _four(builder, high_at, 4 * step))
            low_dots = emit_dot(builder, low_dots, w, _four(builder, low_at, 4 * step))
        dots = builder.add(builder.shl(high_dots, ir.Constant(I32V, [8] * 16)), low_dots)
        scales = _scales(builder, at)
        product = builder.fmul(builder.sitofp(dots, F32V), _float(builder, _at(builder, factors, group, 4)))
        if BIAS:
            offset = builder.fmul(_float(builder, _at(builder, sums, group, 4)), ir.Constant(F32V, [float(BIAS)] * 16))
            product = builder.fsub(product, offset)
        return [fused(builder, scales, product, totals[0])]

    return loop(builder, groups, [total], body)[0]


def residual_scores(bits: int) -> Any:
    """The operation that adds Q x of a panel, for a residual of `bits` bits."""
    unpack, step_bytes = (emit_two_bits, 16) if bits == 2 else (emit_one_bit, 8)
    center = 1.5 if bits == 2 else 0.5

    @operation(f32x16, f32x16, address, index, address)
    def add(builder, total, panel, blocks, x):
        """total + Q x of a panel; x: a quantised row of `blocks` blocks of 64, of which the high plane is read."""
        columns = builder.mul(blocks, ir.Constant(I64, BLOCK))
        factors = builder.add(x, builder.mul(columns, ir.Constant(I64, 2)))
        sums = builder.add(factors, builder.mul(blocks, ir.Constant(I64, 16)))

        def body(block, totals):
            at, x_at = _at(builder, panel, block, RESIDUAL_BYTES[bits]), _at(builder, x, block, BLOCK)
            factors_at, sums_at = _at(builder, factors, block, 8), _at(builder, sums, block, 8)
            product = ir.Constant(F32V, [0.0] * 16)
            for group in range(2):
                dots = ir.Constant(I32V, [0] * 16)
                for step in range(8 * group, 8 * group + 8):
                    codes = unpack(builder, builder.add(at, ir.Constant(I64, 32 + step_bytes * step)))
                    dots = emit_dot(builder, dots, codes, _four(builder, x_at, 4 * step))
                factor = builder.fmul(load(builder, factors_at, F32, 4 * group), ir.Constant(F32, 256.0))
                product = fused(builder, builder.sitofp(dots, F32V), splat(builder, factor), product)
            both = builder.fadd(load(builder, sums_at, F32), load(builder, sums_at, F32, 4))
            product = builder.fsub(product, splat(builder, builder.fmul(both, ir.Constant(F32, center))))
            return [fused(builder, _scales(builder, at), product, totals[0])]

        return loop(builder, blocks, [total], body)[0]

    return add


add_residual_scores_2, add_residual_scores_1 = residual_scores(2), residual_scores(1)


@operation(types.int64, f32x16, types.int64, address)
def list_positive(builder, scores, first, neurons):
    """Store first + lane, int32, for every lane whose score is positive, close together; gives how many."""
    positive = builder.fcmp_ordered(">", scores, ir.Constant(F32V, [0.0] * 16))
    numbers = builder.add(splat(builder, builder.trunc(first, I32)), ir.Constant(I32V, list(range(16))))
    pointer = builder.inttoptr(neurons, I32.as_pointer())
    name = "llvm.masked.compressstore.v16i32"
    store = declare(builder, name, ir.VoidType(), [I32V, pointer.type, positive.type])
    builder.call(store, [numbers, pointer, positive])
    mask = builder.bitcast(positive, ir.IntType(16))
    return builder.zext(call(builder, "llvm.ctpop.i16", mask.type, [mask]), I64)
