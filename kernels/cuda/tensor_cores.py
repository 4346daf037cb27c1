"""What kernels on tensor cores are written with: products of 16 x 8, their operands, and copies to shared memory.

A product is computed by a warp. Of lane l, with g = l // 4 and c = l % 4, hold, of A (16, K), B (K, 8) and C (16, 8),
where a word has two float16 or bfloat16 and K is 16, or four bytes and K is 32:

    a0, a1, a2, a3   word c of row g of A, and of row g + 8; word c + 4 of row g, and of row g + 8
    b0, b1           words c and c + 4 of column g of B
    c0, c1, c2, c3   columns 2 c and 2 c + 1 of row g of C, and of row g + 8: float32, of bytes int32

(the PTX manual, "Matrix Fragments for mma.m16n8k16" and "m16n8k32"). As in intrinsics.py, in the simulator Python twins
of the same meaning take the place of PTX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from svdengine.kernels.cuda.intrinsics import FULL, SIMULATED, lane_index

if SIMULATED:
    _Copy = tuple[Any, int, Any, int, int]  # to, i, words, j, and how many words
    _copies: dict[Any, list[list[_Copy]]] = {}  # groups that a thread has not waited for; the last one is still open

    def _halves(*words: Any) -> Any:
        return np.array(words, np.uint32).view(np.float16).astype(np.float64)

    def _bfloats(*words: Any) -> Any:
        pairs = np.array(words, np.uint32)
        both = np.stack([pairs << np.uint32(16), pairs & np.uint32(0xFFFF0000)], 1)
        return both.reshape(-1).view(np.float32).astype(np.float64)

    def _bytes_of(dtype: Any) -> Callable[..., Any]:
        return lambda *words: np.array(words, np.uint32).view(dtype).astype(np.int64)

    def _product(unpack_a: Any, unpack_b: Any, result: Any) -> Callable[..., Any]:
        """The twin of a product whose words are unpacked so, and whose sums are of the type `result`."""

        def mma(a0: Any, a1: Any, a2: Any, a3: Any, b0: Any, b1: Any, c0: Any, c1: Any, c2: Any, c3: Any) -> Any:
            lane = lane_index()
            quad, column = lane & ~3, 2 * (lane & 3)
            mine = [cuda.shfl_sync(FULL, (a0, a1, a2, a3), quad + k) for k in range(4)]
            upper = unpack_a(*[a[0] for a in mine], *[a[2] for a in mine])
            lower = unpack_a(*[a[1] for a in mine], *[a[3] for a in mine])
            found = []
            for n in (column, column + 1):
                theirs = [cuda.shfl_sync(FULL, (b0, b1), 4 * n + k) for k in range(4)]
                b = unpack_b(*[b[0] for b in theirs], *[b[1] for b in theirs])
                found.append((upper @ b, lower @ b))
            sums = (c0, found[0][0]), (c1, found[1][0]), (c2, found[0][1]), (c3, found[1][1])
            return tuple(result(c + product) for c, product in sums)

        return mma

    mma_f16 = _product(_halves, _halves, np.float32)
    mma_bf16 = _product(_bfloats, _bfloats, np.float32)
    mma_ss = _product(_bytes_of(np.int8), _bytes_of(np.int8), np.int32)
    mma_su = _product(_bytes_of(np.int8), _bytes_of(np.uint8), np.int32)
    mma_us = _product(_bytes_of(np.uint8), _bytes_of(np.int8), np.int32)
    mma_uu = _product(_bytes_of(np.uint8), _bytes_of(np.uint8), np.int32)

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

    def _groups_of_copies() -> list[list[_Copy]]:
        return _copies.setdefault((cuda.blockIdx, cuda.threadIdx), [[]])

    def _finish_copies(count: int) -> None:
        groups = _groups_of_copies()
        for to, i, words, j, size in [copy for group in groups[:count] for copy in group]:
            for k in range(size):
                to[i + k] = words[j + k]
        del groups[:count]

    def copy_async(to: Any, i: Any, words: Any, j: Any, offset: Any) -> None:
        """Begin to copy 16 bytes, four words from item j + offset of global memory to item i of shared memory."""
        j += offset
        assert i % 4 == j % 4 == 0, f"a 16-byte copy from word {j} to {i}"
        _groups_of_copies()[-1].append((to, i, words, j, 4))

    def copy_word_async(to: Any, i: Any, words: Any, j: Any, offset: Any) -> None:
        """Begin to copy one word, from item j + offset of global memory to item i of shared memory."""
        _groups_of_copies()[-1].append((to, i, words, j + offset, 1))

    def close_group() -> None:
        """Make one group of the copies that this thread began since it closed the group before."""
        _groups_of_copies().append([])

    def waiting_for_all_but(count: Any) -> Any:
        """A function that waits until of this thread's closed groups of copies at most the last `count` are not done.

        Other threads see them after a barrier.
        """
        return lambda: _finish_copies(max(0, len(_groups_of_copies()) - 1 - count))

    def wait_for_copies() -> None:
        """Wait until all copies that this thread began are done. Others see them after a barrier."""
        _finish_copies(len(_groups_of_copies()))
        _copies.pop((cuda.blockIdx, cuda.threadIdx), None)

    def load_two(words: Any, i: Any) -> Any:
        """Two words of shared memory from item i, a multiple of 2, at once."""
        assert i % 2 == 0, f"an 8-byte load from item {i}"
        return words[i], words[i + 1]

    def load_words(words: Any, i: Any) -> Any:
        """Four words of shared memory from item i, a multiple of 4, at once."""
        assert i % 4 == 0, f"a 16-byte load from item {i}"
        return words[i], words[i + 1], words[i + 2], words[i + 3]

    def store_words(words: Any, i: Any, a: Any, b: Any, c: Any, d: Any) -> None:
        """Store four words from item i, a multiple of 4, of shared memory at once."""
        assert i % 4 == 0, f"a 16-byte store to item {i}"
        words[i], words[i + 1], words[i + 2], words[i + 3] = a, b, c, d

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

    def _mma(shape, kinds, word, number):
        """What @intrinsic takes for a product: its shape and types for PTX, and the type of its sums."""
        letter = "f" if word is _F32 else "r"

        def generate(context, builder, signature, arguments):
            operands = "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13}"
            text = f"mma.sync.aligned.{shape}.row.col.{kinds} {operands};"
            constraints = f"={letter}," * 4 + "r," * 6 + ",".join(letter * 4)
            struct = _volatile(builder, ir.LiteralStructType([word] * 4), arguments, text, constraints)
            return _tuple(builder, struct, 4)

        return types.UniTuple(number, 4)(*[types.uint32] * 6, *[number] * 4), generate

    @intrinsic
    def mma_f16(typing_context, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
        """C + A B of float16, as four float32; see this file's first lines. The whole warp must call it."""
        return _mma("m16n8k16", "f32.f16.f16.f32", _F32, types.float32)

    @intrinsic
    def mma_bf16(typing_context, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
        """As `mma_f16`, of bfloat16."""
        return _mma("m16n8k16", "f32.bf16.bf16.f32", _F32, types.float32)

    @intrinsic
    def mma_ss(typing_context, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
        """C + A B of int8, as four int32; see this file's first lines. The whole warp must call it."""
        return _mma("m16n8k32", "s32.s8.s8.s32", _I32, types.int32)

    @intrinsic
    def mma_su(typing_context, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
        """As `mma_ss`, of int8 and uint8."""
        return _mma("m16n8k32", "s32.s8.u8.s32", _I32, types.int32)

    @intrinsic
    def mma_us(typing_context, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
        """As `mma_ss`, of uint8 and int8."""
        return _mma("m16n8k32", "s32.u8.s8.s32", _I32, types.int32)

    @intrinsic
    def mma_uu(typing_context, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
        """As `mma_ss`, of uint8."""
        return _mma("m16n8k32", "s32.u8.u8.s32", _I32, types.int32)

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

    def _copy(text, to, words):
        """What @intrinsic takes for a copy from global memory, an address and an offset, to shared memory."""

        def generate(context, builder, signature, arguments):
            kinds = signature.args
            target = _shared_item(context, builder, kinds[0], *arguments[:2])
            source = builder.ptrtoint(_item(context, builder, kinds[2], *arguments[2:4]), ir.IntType(64))
            # Written so, compilers multiply and add a 32-bit offset at once.
            source = builder.add(source, builder.shl(arguments[4], ir.Constant(ir.IntType(64), 2)))
            _volatile(builder, ir.VoidType(), [target, source], text, "r,l,~{memory}")
            return context.get_dummy_value()

        return types.void(to, types.int64, words, types.int64, types.int64), generate

    @intrinsic
    def copy_async(typing_context, to, i, words, j, offset):
        """Begin to copy 16 bytes, four words from item j + offset of global memory to item i of shared memory."""
        return _copy("cp.async.cg.shared.global [$0], [$1], 16;", to, words)

    @intrinsic
    def copy_word_async(typing_context, to, i, words, j, offset):
        """Begin to copy one word, from item j + offset of global memory to item i of shared memory."""
        return _copy("cp.async.ca.shared.global [$0], [$1], 4;", to, words)

    def _then(text):
        """What @intrinsic takes for an instruction on copies."""

        def generate(context, builder, signature, arguments):
            _volatile(builder, ir.VoidType(), [], text, "~{memory}")
            return context.get_dummy_value()

        return types.void(), generate

    @intrinsic
    def close_group(typing_context):
        """Make one group of the copies that this thread began since it closed the group before."""
        return _then("cp.async.commit_group;")

    def waiting_for_all_but(count):
        """A function that waits until of this thread's closed groups of copies at most the last `count` are not done.

        Other threads see them after a barrier.
        """

        @intrinsic
        def wait(typing_context):
            return _then(f"cp.async.wait_group {count};")

        return wait

    @intrinsic
    def wait_for_copies(typing_context):
        """Wait until all copies that this thread began are done. Others see them after a barrier."""
        return _then("cp.async.wait_all;")

    @intrinsic
    def load_two(typing_context, words, i):
        """Two words of shared memory from item i, a multiple of 2, at once."""

        def generate(context, builder, signature, arguments):
            address = _item(context, builder, signature.args[0], *arguments)
            vector = builder.load(builder.bitcast(address, ir.VectorType(_I32, 2).as_pointer()), align=8)
            parts = [builder.extract_element(vector, ir.Constant(_I32, k)) for k in range(2)]
            return cgutils.pack_array(builder, parts)

        return types.UniTuple(types.uint32, 2)(words, types.int64), generate

    @intrinsic
    def load_words(typing_context, words, i):
        """Four words of shared memory from item i, a multiple of 4, at once."""

        def generate(context, builder, signature, arguments):
            address = _shared_item(context, builder, signature.args[0], *arguments)
            returned, text = ir.LiteralStructType([_I32] * 4), "ld.shared.v4.u32 {$0,$1,$2,$3}, [$4];"
            return _tuple(builder, _volatile(builder, returned, [address], text, "=r,=r,=r,=r,r,~{memory}"), 4)

        return types.UniTuple(types.uint32, 4)(words, types.int64), generate

    @intrinsic
    def store_words(typing_context, words, i, a, b, c, d):
        """Store four words from item i, a multiple of 4, of shared memory at once."""

        def generate(context, builder, signature, arguments):
            address = _shared_item(context, builder, signature.args[0], *arguments[:2])
            text = "st.shared.v4.u32 [$0], {$1,$2,$3,$4};"
            _volatile(builder, ir.VoidType(), [address, *arguments[2:]], text, "r,r,r,r,r,~{memory}")
            return context.get_dummy_value()

        return types.void(words, types.int64, *[types.uint32] * 4), generate

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
