"""ternary: two bits a weight, of every 64 columns byte j of 16 holds columns j, j + 16, j + 32 and j + 48."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from svdengine.kernels.cpu.dot import emit_two_bits
from svdengine.kernels.cpu.formats.affine import Unpacking, affine_kernels
from svdengine.kernels.cpu.simd import I8, I64, load, splat

_BYTES = ir.VectorType(I8, 16)


def _sixteen(builder: Any, at: Any, v: Any) -> Any:
    """Columns 16 v to 16 v + 15 of a block."""
    shift = splat(builder, builder.trunc(builder.shl(v, ir.Constant(I64, 1)), I8))
    return builder.and_(builder.lshr(load(builder, at, _BYTES), shift), ir.Constant(_BYTES, [3] * 16))


TERNARY_KERNELS = affine_kernels("ternary", Unpacking(16, emit_two_bits, _sixteen))
