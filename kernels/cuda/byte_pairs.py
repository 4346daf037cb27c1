"""Bytes of rounded activations (rounding.py) as float16 or bfloat16, which multiply weights of these types.

A value of 16 bits is 256 * h + l, h signed and l not. As float16, 16 * h and l / 16 are exact: added up, products are a
sixteenth of those with the values. As in intrinsics.py, in the simulator Python twins take the place of PTX.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.cuda import types

from svdengine.kernels.cuda.intrinsics import SIMULATED

HALF_UNIT = 16.0  # by which a product with `high_halves` and `low_halves` is too small

if SIMULATED:

    def _half_pairs(values: Any) -> Any:
        words = values.astype(np.float16).view(np.uint32)
        return words[0], words[1]

    def high_halves(word: Any) -> Any:
        """16 times four int8, as two words of two float16."""
        return _half_pairs(np.array([word], np.uint32).view(np.int8).astype(np.float32) * 16)

    def low_halves(word: Any) -> Any:
        """Four uint8 divided by 16, as two words of two float16."""
        return _half_pairs(np.array([word], np.uint32).view(np.uint8).astype(np.float32) / 16)

    def bfloat_pair(low: Any, high: Any) -> Any:
        """Two float32, which bfloat16 must hold exactly, as a word of two bfloat16."""
        bits = np.array([low, high], np.float32).view(np.uint32)
        return np.uint32(bits[0] >> np.uint32(16) | bits[1] & np.uint32(0xFFFF0000))

else:
    from llvmlite import ir
    from numba.cuda.extending import intrinsic

    from svdengine.kernels.cuda.intrinsics import _assembly, _tuple

    _I32 = ir.IntType(32)

    def _halves(prepare, upper, less):
        """What @intrinsic takes for the bytes of a word below the float16 `upper`, less the float16 `less`."""

        def generate(context, builder, signature, arguments):
            text = (
                "{.reg .b32 x, p, m; "
                f"{prepare} mov.b32 m, 0x{less:04X}{less:04X}; "
                f"prmt.b32 p, x, 0x{upper:02X}{upper:02X}{upper:02X}{upper:02X}, 0x4140; sub.f16x2 $0, p, m; "
                f"prmt.b32 p, x, 0x{upper:02X}{upper:02X}{upper:02X}{upper:02X}, 0x4342; sub.f16x2 $1, p, m; }}"
            )
            struct = _assembly(builder, ir.LiteralStructType([_I32] * 2), arguments, text, "=r,=r,r")
            return _tuple(builder, struct, 2)

        return types.UniTuple(types.uint32, 2)(types.uint32), generate

    @intrinsic
    def high_halves(typing_context, word):
        """16 times four int8, as two words of two float16."""
        # With 128 added no byte is negative. Below 2**14 a byte counts 16.
        return _halves("xor.b32 x, $2, 0x80808080;", 0x74, 0x7480)

    @intrinsic
    def low_halves(typing_context, word):
        """Four uint8 divided by 16, as two words of two float16."""
        return _halves("mov.b32 x, $2;", 0x54, 0x5400)  # below 2**6 a byte counts a sixteenth

    @intrinsic
    def bfloat_pair(typing_context, low, high):
        """Two float32, which bfloat16 must hold exactly, as a word of two bfloat16."""

        def generate(context, builder, signature, arguments):
            return _assembly(builder, _I32, arguments, "prmt.b32 $0, $1, $2, 0x7632;", "=r,f,f")

        return types.uint32(types.float32, types.float32), generate
