"""Bytes as float16 or bfloat16 for products on tensor cores: rounded activations (rounding.py), and levels of weights.

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

    def _bfloat_pairs(values: Any) -> Any:
        bits = values.astype(np.float32).view(np.uint32)
        return np.uint32(bits[0] >> 16 | bits[2]), np.uint32(bits[1] >> 16 | bits[3])

    def small_levels(word: Any) -> Any:
        """Four uint8 below 128, as two words of two bfloat16: bytes 0 and 2, and bytes 1 and 3."""
        return _bfloat_pairs(np.array([word], np.uint32).view(np.uint8))

    def signed_levels(word: Any) -> Any:
        """As `small_levels`, of int8."""
        return _bfloat_pairs(np.array([word], np.uint32).view(np.int8))

    def split_pair(low: Any, high: Any) -> Any:
        """Two float32 as two words of two bfloat16, whose sums they are but for 2**-17 of them."""
        both = np.array([low, high], np.float32)
        first = _nearest_bfloats(both)
        with np.errstate(invalid="ignore"):
            second = _nearest_bfloats(both - first)
        return bfloat_pair(*first), bfloat_pair(*second)

    def _nearest_bfloats(values: Any) -> Any:
        bits = values.view(np.uint32)
        rounded = ((bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
        return np.where(np.isfinite(values), rounded, values)

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

    def _levels(made):
        """What @intrinsic takes for bytes below the exponent of 128, of which `made` makes numbers: of p, word $k."""
        prepare = "{.reg .b32 p, m, s, one; mov.b32 one, 0x3F803F80; "

        def generate(context, builder, signature, arguments):
            lines = (
                f"prmt.b32 p, $2, 0x43434343, {order}; {made} fma.rn.bf16x2 ${k}, m, one, s; "
                for k, order in enumerate(("0x4240", "0x4341"))
            )
            text = prepare + "".join(lines) + "}"
            return _tuple(builder, _assembly(builder, ir.LiteralStructType([_I32] * 2), arguments, text, "=r,=r,r"), 2)

        return types.UniTuple(types.uint32, 2)(types.uint32), generate

    @intrinsic
    def small_levels(typing_context, word):
        """Four uint8 below 128, as two words of two bfloat16: bytes 0 and 2, and bytes 1 and 3."""
        return _levels("mov.b32 m, p; mov.b32 s, 0xC300C300;")  # 128 + the byte, less 128

    @intrinsic
    def signed_levels(typing_context, word):
        """As `small_levels`, of int8."""
        # 128 + the low seven bits, less 128 or, where the eighth is set, 256.
        return _levels("and.b32 m, p, 0xFF7FFF7F; and.b32 s, p, 0xFF80FF80; or.b32 s, s, 0x80008000;")

    @intrinsic
    def split_pair(typing_context, low, high):
        """Two float32 as two words of two bfloat16, whose sums they are but for 2**-17 of them."""

        def generate(context, builder, signature, arguments):
            text = (
                "{.reg .f32 a, b; .reg .b32 t; cvt.rn.bf16x2.f32 $0, $3, $2; "
                "shl.b32 t, $0, 16; mov.b32 a, t; sub.f32 a, $2, a; "
                "and.b32 t, $0, 0xFFFF0000; mov.b32 b, t; sub.f32 b, $3, b; cvt.rn.bf16x2.f32 $1, b, a;}"
            )
            struct = _assembly(builder, ir.LiteralStructType([_I32] * 2), arguments, text, "=&r,=r,f,f")
            return _tuple(builder, struct, 2)

        return types.UniTuple(types.uint32, 2)(types.float32, types.float32), generate

    @intrinsic
    def bfloat_pair(typing_context, low, high):
        """Two float32, which bfloat16 must hold exactly, as a word of two bfloat16."""

        def generate(context, builder, signature, arguments):
            return _assembly(builder, _I32, arguments, "prmt.b32 $0, $1, $2, 0x7632;", "=r,f,f")

        return types.uint32(types.float32, types.float32), generate
