"""Additions to memory that several blocks share, and the fence that orders what they write.

They are for integers only: the order of blocks must not show in a result.
"""

from __future__ import annotations

from typing import Any

from svdengine.kernels.cuda.intrinsics import SIMULATED

if SIMULATED:

    def fetch_add(values: Any, i: Any, x: Any) -> Any:
        """Add to item i of int32 `values`, which other blocks may do at the same time; what it was before."""
        before = values[i]
        values[i] = before + x
        return before

    def fence() -> None:
        """What this thread wrote before is seen by every thread that sees what it writes afterwards."""

else:
    from llvmlite import ir
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    _I32 = ir.IntType(32)

    @intrinsic
    def fetch_add(typing_context, values, i, x):
        """Add to item i of int32 `values`, which other blocks may do at the same time; what it was before."""

        def generate(context, builder, signature, arguments):
            base, index, added = arguments
            operands = [builder.gep(base, [index]), added]
            function = ir.FunctionType(_I32, [operand.type for operand in operands])
            text = "atom.global.add.u32 $0, [$1], $2;"
            return builder.call(ir.InlineAsm(function, text, "=r,l,r,~{memory}", side_effect=True), operands)

        return types.int32(values, types.int64, types.int32), generate

    @intrinsic
    def fence(typing_context):
        """What this thread wrote before is seen by every thread that sees what it writes afterwards."""

        def generate(context, builder, signature, arguments):
            function = ir.FunctionType(ir.VoidType(), [])
            builder.call(ir.InlineAsm(function, "fence.acq_rel.gpu;", "~{memory}", side_effect=True), [])
            return context.get_dummy_value()

        return types.void(), generate
