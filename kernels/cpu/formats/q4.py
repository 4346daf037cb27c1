"""q4: four bits a weight; of every 64 columns byte j holds column j in its low half and j + 32 in its high half."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from svdengine.kernels.cpu import isa
from svdengine.kernels.cpu.dot import emit_nibbles
from svdengine.kernels.cpu.formats.affine import Unpacking, affine_kernels
from svdengine.kernels.cpu.simd import F32V, I8, I32V, I64, ISA, call, fused, load, splat

_BYTES = ir.VectorType(I8, 16)


def emit_sixteen_halves(builder: Any, at: Any, v: Any) -> Any:
    """Columns 16 v to 16 v + 15 of a block: the low or the high halves of 16 bytes."""
    one = ir.Constant(I64, 1)
    packed = load(builder, builder.add(at, builder.mul(builder.and_(v, one), ir.Constant(I64, 16))), _BYTES)
    shift = builder.shl(builder.lshr(v, one), ir.Constant(I64, 2))
    return builder.and_(builder.lshr(packed, splat(builder, builder.trunc(shift, I8))), ir.Constant(_BYTES, [15] * 16))


def add_by_table(builder: Any, at: Any, totals: Any, weights: Any, lowest: Any) -> Any:
    """Add a row's block, each weight looked up among the sixteen of its group."""
    levels = ir.Constant(F32V, [float(level) for level in range(16)])
    first, second = (
        fused(builder, levels, weight, builder.fneg(low)) for weight, low in zip(weights, lowest, strict=True)
    )
    sums = list(totals)
    for i in range(2):
        packed = builder.zext(load(builder, at, _BYTES, 16 * i), I32V)
        for v, table, halves in (
            (i, first, packed),
            (2 + i, second, builder.lshr(packed, ir.Constant(I32V, [4] * 16))),
        ):
            looked_up = call(builder, "llvm.x86.avx512.permvar.sf.512", F32V, [table, halves])  # by the low four bits
            sums[v] = builder.fadd(sums[v], looked_up)
    return sums


_ADD = add_by_table if ISA == isa.AVX512 else None  # others have no table of sixteen
Q4_KERNELS = affine_kernels("q4", Unpacking(32, emit_nibbles, emit_sixteen_halves, _ADD))
