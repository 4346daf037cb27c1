"""q4: four bits a weight; of every 64 columns byte j holds column j in its low half and j + 32 in its high half."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from svdengine.kernels.cpu.dot import emit_nibbles
from svdengine.kernels.cpu.formats.affine import Unpacking, affine_kernels
from svdengine.kernels.cpu.simd import I8, I64, load, splat

_BYTES = ir.VectorType(I8, 16)


def emit_sixteen_halves(builder: Any, at: Any, v: Any) -> Any:
    """Columns 16 v to 16 v + 15 of a block: the low or the high halves of 16 bytes."""
    one = ir.Constant(I64, 1)
    packed = load(builder, builder.add(at, builder.mul(builder.and_(v, one), ir.Constant(I64, 16))), _BYTES)
    shift = builder.shl(builder.lshr(v, one), ir.Constant(I64, 2))
    return builder.and_(builder.lshr(packed, splat(builder, builder.trunc(shift, I8))), ir.Constant(_BYTES, [15] * 16))


Q4_KERNELS = affine_kernels("q4", Unpacking(32, emit_nibbles, emit_sixteen_halves))
