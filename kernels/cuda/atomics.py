"""Additions to memory that several blocks share, the fence that orders what they write, and which of them is the last.

They are for integers only: the order of blocks must not show in a result.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from svdengine.kernels.cuda.intrinsics import SIMULATED, jit

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


@jit(device=True)
def is_last_block(tickets, at, blocks):
    """Whether this block is the last to come here of the `blocks` that share item `at` of `tickets`, int32.

    Every thread calls it. What the others wrote before they came is there for the last one. The item is zero before a
    kernel and after it. A kernel must come to it by one device function at most, as to `block_sum`.
    """
    last = cuda.shared.array(1, types.int32)
    fence()
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        last[0] = np.int32(fetch_add(tickets, at, np.int32(1)) == blocks - 1)
    cuda.syncthreads()
    if last[0] == 0:
        return False
    fence()
    if cuda.threadIdx.x == 0:
        tickets[at] = np.int32(0)
    return True
