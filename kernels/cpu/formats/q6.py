"""q6: six bits a weight, of every 64 columns 32 bytes of low halves as in q4, then 16 bytes of upper bit pairs."""

from __future__ import annotations

from llvmlite import ir

from svdengine.kernels.cpu.dot import emit_nibbles, emit_two_bits
from svdengine.kernels.cpu.formats.scaled import Unpacking, scaled_kernels
from svdengine.kernels.cpu.simd import I8, I8V, I64, load, splat

_BYTES = ir.VectorType(I8, 16)


def _block(builder, at):
    upper = emit_two_bits(builder, builder.add(at, ir.Constant(I64, 32)))
    return builder.or_(emit_nibbles(builder, at), builder.shl(upper, ir.Constant(I8V, [4] * 64)))


def _sixteen(builder, at, v):
    """Columns 16 v to 16 v + 15: a half of 16 bytes, and one of the bit pairs of the last 16 bytes."""
    one = ir.Constant(I64, 1)

    def shifted(packed, shift, mask):
        lanes = splat(builder, builder.trunc(shift, I8))
        return builder.and_(builder.lshr(packed, lanes), ir.Constant(_BYTES, [mask] * 16))

    halves = load(builder, builder.add(at, builder.mul(builder.and_(v, one), ir.Constant(I64, 16))), _BYTES)
    low = shifted(halves, builder.shl(builder.lshr(v, one), ir.Constant(I64, 2)), 15)
    upper = shifted(load(builder, at, _BYTES, 32), builder.shl(v, one), 3)
    q = builder.or_(low, builder.shl(upper, ir.Constant(_BYTES, [4] * 16)))
    return builder.sub(q, ir.Constant(_BYTES, [32] * 16))


Q6_KERNELS = scaled_kernels("q6", Unpacking(48, 32, _block, _sixteen))
