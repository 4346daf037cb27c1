"""q6: six bits a weight, of every 64 columns 32 bytes of low halves as in q4, then 16 bytes of upper bit pairs."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from svdengine.kernels.cpu.dot import emit_nibbles, emit_two_bits
from svdengine.kernels.cpu.formats.affine import Unpacking, affine_kernels
from svdengine.kernels.cpu.formats.q4 import emit_sixteen_halves
from svdengine.kernels.cpu.simd import I8, I8V, I64, load, splat

_BYTES = ir.VectorType(I8, 16)


def _block(builder: Any, at: Any) -> Any:
    upper = emit_two_bits(builder, builder.add(at, ir.Constant(I64, 32)))
    return builder.or_(emit_nibbles(builder, at), builder.shl(upper, ir.Constant(I8V, [4] * 64)))


def _sixteen(builder: Any, at: Any, v: Any) -> Any:
    """Columns 16 v to 16 v + 15 of a block."""
    shift = splat(builder, builder.trunc(builder.shl(v, ir.Constant(I64, 1)), I8))
    upper = builder.and_(builder.lshr(load(builder, at, _BYTES, 32), shift), ir.Constant(_BYTES, [3] * 16))
    return builder.or_(emit_sixteen_halves(builder, at, v), builder.shl(upper, ir.Constant(_BYTES, [4] * 16)))


Q6_KERNELS = affine_kernels("q6", Unpacking(48, _block, _sixteen))
