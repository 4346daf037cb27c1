"""What kernels on tensor cores are written with: products of 16 x 8 x 16, their operands, and copies to shared memory.

A product `mma_f16` is computed by a warp. Of lane l, with g = l // 4 and c = 2 * (l % 4), hold

    a0, a1, a2, a3   A (16, 16): row g, columns c and c + 1; row g + 8; row g from column c + 8 on; row g + 8 there
    b0, b1           B (16, 8): rows c and c + 1 of column g; rows c + 8 and c + 9
    c0, c1, c2, c3   C (16, 8), float32: row g, columns c and c + 1; row g + 8

two float16 in a word (the PTX manual, "Matrix Fragments for mma.m16n8k16"). As in intrinsics.py, in the simulator
Python twins of the same meaning take the place of PTX.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from svdengine.kernels.cuda.intrinsics import FULL, SIMULATED, lane_index

if SIMULATED:
    _copies: dict[Any, list[tuple[Any, int, Any, int]]] = {}  # that a thread has not waited for

    def _halves(*words: Any) -> Any:
        return np.array(words, np.uint32).view(np.float16).astype(np.float64)

    def mma_f16(a0: Any, a1: Any, a2: Any, a3: Any, b0: Any, b1: Any, c0: Any, c1: Any, c2: Any, c3: Any) -> Any:
        """C + A B, as four float32; see this file's first lines. The whole warp must call it."""
        lane = lane_index()
        quad, column = lane & ~3, 2 * (lane & 3)
        mine = [cuda.shfl_sync(FULL, (a0, a1, a2, a3), quad + k) for k in range(4)]
        upper = _halves(*[a[0] for a in mine], *[a[2] for a in mine])
        lower = _halves(*[a[1] for a in mine], *[a[3] for a in mine])
        found = []
        for n in (column, column + 1):
            theirs = [cuda.shfl_sync(FULL, (b0, b1), 4 * n + k) for k in range(4)]
            b = _halves(*[b[0] for b in theirs], *[b[1] for b in theirs])
            found.append((upper @ b, lower @ b))
        sums = (c0, found[0][0]), (c1, found[1][0]), (c2, found[0][1]), (c3, found[1][1])
        return tuple(np.float32(c + product) for c, product in sums)

    def _row(words: Any, i: Any) -> Any:
        assert i % 4 == 0, f"16 bytes of a matrix from word {i}"
        return words[i], words[i + 1], words[i + 2], words[i + 3]

    def load_matrices(words: Any, i: Any) -> Any:
        """Four 8 x 8 matrices of float16 in shared memory: of matrix m, this lane's word of row lane // 4.

        i: where in `words` row lane % 8 of matrix lane // 8 begins, a multiple of 4. The whole warp must call it.
        """
        row, lane = _row(words, i), lane_index()
        return tuple(cuda.shfl_sync(FULL, row, 8 * m + (lane >> 2))[lane & 3] for m in range(4))

    def load_transposed_matrices(words: Any, i: Any) -> Any:
        """As `load_matrices`, of the transposed matrices."""
        row, lane = _row(words, i), lane_index()
        found = []
        for m in range(4):
            pair = [cuda.shfl_sync(FULL, row, 8 * m + 2 * (lane & 3) + k)[lane >> 3] for k in range(2)]
            low, high = [int(word) >> (16 * int(lane >> 2 & 1)) & 0xFFFF for word in pair]
            found.append(np.uint32(low | high << 16))
        return tuple(found)

    def copy_async(to: Any, i: Any, words: Any, j: Any, offset: Any) -> None:
        """Begin to copy 16 bytes, four words from item j + offset of global memory to item i of shared memory."""
        j += offset
        assert i % 4 == j % 4 == 0, f"a 16-byte copy from word {j} to {i}"
        _copies.setdefault((cuda.blockIdx, cuda.threadIdx), []).append((to, i, words, j))

    def wait_for_copies() -> None:
        """Wait until all copies that this thread began are done. Others see them after a barrier."""
        for to, i, words, j in _copies.pop((cuda.blockIdx, cuda.threadIdx), []):
            for k in range(4):
                to[i + k] = words[j + k]

    def load_four(values: Any, i: Any) -> Any:
        """Four float32 of shared memory from item i, a multiple of 4, at once."""
        assert i % 4 == 0, f"a 16-byte load from item {i}"
        return values[i], values[i + 1], values[i + 2], values[i + 3]

    def exp2(x: Any) -> Any:
        """2 to the power of a float32."""
        return np.float32(np.exp2(np.float32(x)))

else:
    from llvmlite import ir
    from numba.cuda import cgutils
    from numba.cuda.extending import intrinsic

    from svdengine.kernels.cuda.intrinsics import _assembly, _item, _tuple

    _I32, _F32 = ir.IntType(32), ir.FloatType()
    _SHARED = 3  # the address space

    def _volatile(builder, returned, arguments, text, constraints):
        function = ir.FunctionType(returned, [a.type for a in arguments])
        return builder.call(ir.InlineAsm(function, text, constraints, side_effect=True), arguments)

    def _shared_item(context, builder, kind, base, i):
        """The address of item i of a shared array, as 32 bits."""
        address = _item(context, builder, kind, base, i)
        address = builder.addrspacecast(address, ir.PointerType(address.type.pointee, _SHARED))
        return builder.ptrtoint(address, _I32)

    @intrinsic
    def mma_f16(typing_context, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
        """C + A B, as four float32; see this file's first lines. The whole warp must call it."""

        def generate(context, builder, signature, arguments):
            text = (
                "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
                " {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
            )
            returned = ir.LiteralStructType([_F32] * 4)
            struct = _volatile(builder, returned, arguments, text, "=f," * 4 + "r," * 6 + "f,f,f,f")
            return _tuple(builder, struct, 4)

        return types.UniTuple(types.float32, 4)(*[types.uint32] * 6, *[types.float32] * 4), generate

    def _load_matrices(words, modifier):
        def generate(context, builder, signature, arguments):
            address = _shared_item(context, builder, signature.args[0], *arguments)
            text = f"ldmatrix.sync.aligned.m8n8.x4{modifier}.shared.b16 {{$0,$1,$2,$3}}, [$4];"
            returned = ir.LiteralStructType([_I32] * 4)
            struct = _volatile(builder, returned, [address], text, "=r,=r,=r,=r,r,~{memory}")
            return _tuple(builder, struct, 4)

        return types.UniTuple(types.uint32, 4)(words, types.int64), generate

    @intrinsic
    def load_matrices(typing_context, words, i):
        """Four 8 x 8 matrices of float16 in shared memory: of matrix m, this lane's word of row lane // 4.

        i: where in `words` row lane % 8 of matrix lane // 8 begins, a multiple of 4. The whole warp must call it.
        """
        return _load_matrices(words, "")

    @intrinsic
    def load_transposed_matrices(typing_context, words, i):
        """As `load_matrices`, of the transposed matrices."""
        return _load_matrices(words, ".trans")

    @intrinsic
    def copy_async(typing_context, to, i, words, j, offset):
        """Begin to copy 16 bytes, four words from item j + offset of global memory to item i of shared memory."""

        def generate(context, builder, signature, arguments):
            kinds = signature.args
            target = _shared_item(context, builder, kinds[0], *arguments[:2])
            source = builder.gep(_item(context, builder, kinds[2], *arguments[2:4]), [arguments[4]])
            text = "cp.async.cg.shared.global [$0], [$1], 16;"
            _volatile(builder, ir.VoidType(), [target, source], text, "r,l,~{memory}")
            return context.get_dummy_value()

        return types.void(to, types.int64, words, types.int64, types.int64), generate

    @intrinsic
    def wait_for_copies(typing_context):
        """Wait until all copies that this thread began are done. Others see them after a barrier."""

        def generate(context, builder, signature, arguments):
            _volatile(builder, ir.VoidType(), [], "cp.async.wait_all;", "~{memory}")
            return context.get_dummy_value()

        return types.void(), generate

    @intrinsic
    def load_four(typing_context, values, i):
        """Four float32 of shared memory from item i, a multiple of 4, at once."""

        def generate(context, builder, signature, arguments):
            address = _item(context, builder, signature.args[0], *arguments)
            four = ir.VectorType(_F32, 4)
            vector = builder.load(builder.bitcast(address, four.as_pointer()), align=16)
            parts = [builder.extract_element(vector, ir.Constant(_I32, k)) for k in range(4)]
            return cgutils.pack_array(builder, parts)

        return types.UniTuple(types.float32, 4)(values, types.int64), generate

    @intrinsic
    def exp2(typing_context, x):
        """2 to the power of a float32."""

        def generate(context, builder, signature, arguments):
            return _assembly(builder, _F32, arguments, "ex2.approx.ftz.f32 $0, $1;", "=f,f")

        return types.float32(types.float32), generate
