"""q8: int8 weights, as they are."""

from __future__ import annotations

from llvmlite import ir

from svdengine.kernels.cpu.dot import BIAS, emit_bias
from svdengine.kernels.cpu.formats.scaled import Unpacking, scaled_kernels
from svdengine.kernels.cpu.simd import I8, I8V, I64, load


def _block(builder, at):
    return emit_bias(builder, load(builder, at, I8V))


def _sixteen(builder, at, v):
    return load(builder, builder.add(at, builder.mul(v, ir.Constant(I64, 16))), ir.VectorType(I8, 16))


Q8_KERNELS = scaled_kernels("q8", Unpacking(64, BIAS, _block, _sixteen))
