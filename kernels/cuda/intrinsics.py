"""What CUDA kernels are written with: the decorators, 16-byte loads, unpacking in registers, sums over a warp or block.

A kernel takes flat arrays and 32-bit numbers, nothing else, and says so in a line that `kernel` is given:

    @kernel("uint32* words, float32* x, float32* y, int32 rows")
    def product(words, x, y, rows): ...

On a GPU an array is an address, so indices are not checked and launches are cheap; in Numba's simulator it is a NumPy
array. Weights of every format are seen as uint32 words. Nothing is compiled at import. With NUMBA_ENABLE_CUDASIM=1,
set before Numba is first imported, what is written in PTX here is replaced by Python twins of the same meaning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

# Numba's CUDA target reads the variable from here, and so does its simulator.
from numba.cuda.core import config as numba_config

SIMULATED = bool(numba_config.ENABLE_CUDASIM)
WARP = 32  # lanes
FULL = 0xFFFFFFFF  # the mask of all lanes
MOST_WARPS = 32  # in a block
_LOWEST = np.float32(-np.inf)


@dataclass(frozen=True)
class Kernel:
    """A kernel that a device can launch, and the types of its parameters."""

    name: str
    module: str
    parameters: tuple[str, ...]  # "uint32*", "int32", ... in order
    dispatcher: Any  # Numba's; in the simulator a callable after [grid, block]

    def signature(self) -> Any:
        """Numba's signature: addresses for arrays, numbers by value."""
        return types.void(*map(_numba_type, self.parameters))


def kernel(parameters: str, name: str = "", **options: Any) -> Callable[[Callable[..., None]], Kernel]:
    """Decorate a kernel whose parameters are `parameters`, "type name, type* name, ...". It is compiled on first use.

    name: what it is called instead of its function's name, for functions made in a loop. options: those of cuda.jit.
    Raises ValueError when the parameters are not those of the function.
    """

    def decorate(function: Callable[..., None]) -> Kernel:
        kinds, names = _parse(parameters)
        code = function.__code__
        if names != code.co_varnames[: code.co_argcount]:
            raise ValueError(f"{function.__name__} takes {code.co_varnames[: code.co_argcount]}, declared are {names}")
        function.__name__ = function.__qualname__ = name or function.__name__
        return Kernel(function.__name__, function.__module__, kinds, jit(function, **options))

    return decorate


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """cuda.jit without a signature, so that nothing is compiled at import; device=True for parts of kernels.

    In the simulator a device function stays what it is, and options that it does not know are left out.
    """
    if function is None:
        return lambda f: jit(f, **options)
    if not SIMULATED:
        return cuda.jit(function, **options)
    if options.get("device"):
        return function
    return cuda.jit(function, **{k: v for k, v in options.items() if k in ("fastmath", "debug")})


def unrolled(body: Callable[..., None], count: int) -> Any:
    """run(first, *arguments): body(first, *arguments), body(first + 1, *arguments), and so on, `count` calls.

    There is no loop, so that local arrays which are indexed by constants and by `first` are registers. `body` is a
    device function of a constant; compilers keep loops as they are when their bodies are large.
    """
    if count == 1:
        return body
    half = count // 2
    low, high = unrolled(body, half), unrolled(body, count - half)

    @jit(device=True, forceinline=True)
    def run(first, *arguments):
        low(first, *arguments)
        high(first + half, *arguments)

    return run


def _parse(parameters: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Types and names of "uint32* words, int32 rows"."""
    kinds, names = zip(*(part.split() for part in parameters.split(",")), strict=True)
    return kinds, names


def _numba_type(kind: str) -> Any:
    return types.CPointer(getattr(types, kind[:-1])) if kind.endswith("*") else getattr(types, kind)


if SIMULATED:

    def _view(word: Any, dtype: Any) -> Any:
        return np.array([word], np.uint32).view(dtype)

    def ldg128(words: Any, i: Any) -> Any:
        """Four uint32 words from item i, a multiple of 4, in one load of memory that no thread writes meanwhile."""
        assert i % 4 == 0, f"a 16-byte load from word {i}"
        return words[i], words[i + 1], words[i + 2], words[i + 3]

    def ldg128_once(words: Any, i: Any) -> Any:
        """As `ldg128`, of what is read once: it is not kept in the multiprocessor's own cache."""
        return ldg128(words, i)

    def ldg128_near(words: Any, i: Any, offset: Any) -> Any:
        """As `ldg128_once` from item i + offset: cheap where several offsets have the same i."""
        return ldg128(words, i + offset)

    def ldg64(words: Any, i: Any) -> Any:
        """Two uint32 words from item i, a multiple of 2, as `ldg128`."""
        assert i % 2 == 0, f"an 8-byte load from word {i}"
        return words[i], words[i + 1]

    def h2f(word: Any) -> Any:
        """Two float16 in a word -> two float32, the lower half first."""
        low, high = _view(word, np.float16).astype(np.float32)
        return low, high

    def f2h(low: Any, high: Any) -> Any:
        """Two float32 -> two float16 in a word, rounded to nearest even."""
        with np.errstate(over="ignore"):
            return np.array([low, high], np.float32).astype(np.float16).view(np.uint32)[0]

    def bf2f(word: Any) -> Any:
        """Two bfloat16 in a word -> two float32, the lower half first."""
        low, high = np.array([int(word) << 16 & FULL, int(word) & 0xFFFF0000], np.uint32).view(np.float32)
        return low, high

    def s8x4(word: Any) -> Any:
        """Four int8 in a word -> four float32, the lowest byte first."""
        return tuple(_view(word, np.int8).astype(np.float32))

    def u8x4(word: Any) -> Any:
        """Four uint8 in a word -> four float32, the lowest byte first."""
        return tuple(_view(word, np.uint8).astype(np.float32))

    def stg128(values: Any, i: Any, a: Any, b: Any, c: Any, d: Any) -> None:
        """Store four float32 from item i of `values`, a multiple of 4, at once."""
        assert i % 4 == 0, f"a 16-byte store to item {i}"
        values[i], values[i + 1], values[i + 2], values[i + 3] = a, b, c, d

    def add_atomic(values: Any, i: Any, x: Any) -> None:
        """Add to item i of int64 `values`, which other threads may do at the same time."""
        values[i] += x

    def as_float(word: Any) -> Any:
        """The float32 whose bits are the word."""
        return _view(word, np.float32)[0]

    def as_word(x: Any) -> Any:
        """The bits of a float32."""
        return np.array([x], np.float32).view(np.uint32)[0]

    def to_int(x: Any) -> Any:
        """The int32 nearest to a float32, the even one of two; 0 for NaN."""
        return np.int32(np.rint(x)) if x == x else np.int32(0)

    def dp4a(a: Any, b: Any, c: Any) -> Any:
        """The int32 c plus the product of four int8 in a word with four int8."""
        return np.int32(int(c) + int(_view(a, np.int8).astype(np.int64) @ _view(b, np.int8)))

    def dp4a_su(a: Any, b: Any, c: Any) -> Any:
        """The int32 c plus the product of four int8 in a word with four uint8."""
        return np.int32(int(c) + int(_view(a, np.int8).astype(np.int64) @ _view(b, np.uint8)))

    def dp4a_us(a: Any, b: Any, c: Any) -> Any:
        """The int32 c plus the product of four uint8 in a word with four int8."""
        return dp4a_su(b, a, c)

    def dp4a_uu(a: Any, b: Any, c: Any) -> Any:
        """The int32 c plus the product of four uint8 in a word with four uint8."""
        return np.int32(int(c) + int(_view(a, np.uint8).astype(np.int64) @ _view(b, np.uint8)))

else:
    from llvmlite import ir
    from numba.cuda import cgutils
    from numba.cuda.extending import intrinsic

    _I32, _F32 = ir.IntType(32), ir.FloatType()

    def _assembly(builder, returned, arguments, text, constraints):
        function = ir.FunctionType(returned, [a.type for a in arguments])
        return builder.call(ir.InlineAsm(function, text, constraints), arguments)

    def _tuple(builder, struct, count):
        return cgutils.pack_array(builder, [builder.extract_value(struct, k) for k in range(count)])

    def _item(context, builder, kind, base, i):
        """The address of item i of an array or pointer."""
        if not isinstance(kind, types.CPointer):
            base = context.make_array(kind)(context, builder, base).data
        return builder.gep(base, [i])

    def _load(words, modifiers, count, indices=1):
        """What @intrinsic takes for a load of `count` uint32 words, of memory that no thread writes meanwhile."""

        def generate(context, builder, signature, arguments):
            address = _item(context, builder, signature.args[0], *arguments[:2])
            for offset in arguments[2:]:
                address = builder.gep(address, [offset])
            to = ",".join(f"${k}" for k in range(count))
            text = f"ld.global.nc{modifiers}.v{count}.u32 {{{to}}}, [${count}];"
            struct = _assembly(builder, ir.LiteralStructType([_I32] * count), [address], text, "=r," * count + "l")
            return _tuple(builder, struct, count)

        return types.UniTuple(types.uint32, count)(words, *[types.int64] * indices), generate

    @intrinsic
    def ldg128(typing_context, words, i):
        """Four uint32 words from item i, a multiple of 4, in one load of memory that no thread writes meanwhile."""
        return _load(words, "", 4)

    @intrinsic
    def ldg128_once(typing_context, words, i):
        """As `ldg128`, of what is read once: it is not kept in the multiprocessor's own cache."""
        return _load(words, ".L1::no_allocate", 4)

    @intrinsic
    def ldg128_near(typing_context, words, i, offset):
        """As `ldg128_once` from item i + offset: cheap where several offsets have the same i."""
        return _load(words, ".L1::no_allocate", 4, indices=2)

    @intrinsic
    def ldg64(typing_context, words, i):
        """Two uint32 words from item i, a multiple of 2, as `ldg128`."""
        return _load(words, "", 2)

    @intrinsic
    def h2f(typing_context, word):
        """Two float16 in a word -> two float32, the lower half first."""

        def generate(context, builder, signature, arguments):
            text = "{.reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h;}"
            struct = _assembly(builder, ir.LiteralStructType([_F32] * 2), arguments, text, "=f,=f,r")
            return _tuple(builder, struct, 2)

        return types.UniTuple(types.float32, 2)(types.uint32), generate

    @intrinsic
    def f2h(typing_context, low, high):
        """Two float32 -> two float16 in a word, rounded to nearest even."""

        def generate(context, builder, signature, arguments):
            text = "{.reg .b16 l, h; cvt.rn.f16.f32 l, $1; cvt.rn.f16.f32 h, $2; mov.b32 $0, {l, h};}"
            return _assembly(builder, _I32, arguments, text, "=r,f,f")

        return types.uint32(types.float32, types.float32), generate

    @intrinsic
    def bf2f(typing_context, word):
        """Two bfloat16 in a word -> two float32, the lower half first."""

        def generate(context, builder, signature, arguments):
            low = builder.shl(arguments[0], ir.Constant(_I32, 16))
            high = builder.and_(arguments[0], ir.Constant(_I32, 0xFFFF0000))
            return cgutils.pack_array(builder, [builder.bitcast(low, _F32), builder.bitcast(high, _F32)])

        return types.UniTuple(types.float32, 2)(types.uint32), generate

    def _bytes_as_floats(prepare, offset):
        """What @intrinsic takes for the four bytes of a word as float32, less an offset.

        A byte below the exponent of 2**23 is 2**23 + the byte; conversions of integers are slower on most GPUs. In
        assembly: where bytes are made of several words at once, LLVM would make each by itself.
        """

        def generate(context, builder, signature, arguments):
            less = f"0f{0x4B000000 + offset:08X}"
            lines = (f"prmt.b32 t, x, 0x4B000000, 0x744{k}; sub.f32 ${k}, t, {less};" for k in range(4))
            text = "{.reg .b32 t, x; " + prepare + " " + " ".join(lines) + "}"
            struct = _assembly(builder, ir.LiteralStructType([_F32] * 4), arguments, text, "=f,=f,=f,=f,r")
            return _tuple(builder, struct, 4)

        return types.UniTuple(types.float32, 4)(types.uint32), generate

    @intrinsic
    def s8x4(typing_context, word):
        """Four int8 in a word -> four float32, the lowest byte first."""
        return _bytes_as_floats("xor.b32 x, $4, 0x80808080;", 128)

    @intrinsic
    def u8x4(typing_context, word):
        """Four uint8 in a word -> four float32, the lowest byte first."""
        return _bytes_as_floats("mov.b32 x, $4;", 0)

    @intrinsic
    def stg128(typing_context, values, i, a, b, c, d):
        """Store four float32 from item i of `values`, a multiple of 4, at once."""

        def generate(context, builder, signature, arguments):
            address = _item(context, builder, signature.args[0], *arguments[:2])
            operands = [address, *arguments[2:]]
            function = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
            text = "st.global.v4.f32 [$0], {$1,$2,$3,$4};"
            builder.call(ir.InlineAsm(function, text, "l,f,f,f,f,~{memory}", side_effect=True), operands)
            return context.get_dummy_value()

        return types.void(values, types.int64, *[types.float32] * 4), generate

    @intrinsic
    def add_atomic(typing_context, values, i, x):
        """Add to item i of int64 `values`, which other threads may do at the same time."""

        def generate(context, builder, signature, arguments):
            operands = [_item(context, builder, signature.args[0], *arguments[:2]), arguments[2]]
            function = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
            text = "red.global.add.u64 [$0], $1;"
            builder.call(ir.InlineAsm(function, text, "l,l,~{memory}", side_effect=True), operands)
            return context.get_dummy_value()

        return types.void(values, types.int64, types.int64), generate

    @intrinsic
    def as_float(typing_context, word):
        """The float32 whose bits are the word."""

        def generate(context, builder, signature, arguments):
            return builder.bitcast(arguments[0], _F32)

        return types.float32(types.uint32), generate

    @intrinsic
    def as_word(typing_context, x):
        """The bits of a float32."""

        def generate(context, builder, signature, arguments):
            return builder.bitcast(arguments[0], _I32)

        return types.uint32(types.float32), generate

    @intrinsic
    def to_int(typing_context, x):
        """The int32 nearest to a float32, the even one of two; 0 for NaN."""

        def generate(context, builder, signature, arguments):
            return _assembly(builder, _I32, arguments, "cvt.rni.s32.f32 $0, $1;", "=r,f")

        return types.int32(types.float32), generate

    def _dp4a(kinds):
        """What @intrinsic takes for the int32 c plus the product of four bytes in a word with four in another."""

        def generate(context, builder, signature, arguments):
            return _assembly(builder, _I32, arguments, f"dp4a.{kinds} $0, $1, $2, $3;", "=r,r,r,r")

        return types.int32(types.uint32, types.uint32, types.int32), generate

    @intrinsic
    def dp4a(typing_context, a, b, c):
        """The int32 c plus the product of four int8 in a word with four int8."""
        return _dp4a("s32.s32")

    @intrinsic
    def dp4a_su(typing_context, a, b, c):
        """The int32 c plus the product of four int8 in a word with four uint8."""
        return _dp4a("s32.u32")

    @intrinsic
    def dp4a_us(typing_context, a, b, c):
        """The int32 c plus the product of four uint8 in a word with four int8."""
        return _dp4a("u32.s32")

    @intrinsic
    def dp4a_uu(typing_context, a, b, c):
        """The int32 c plus the product of four uint8 in a word with four uint8."""
        return _dp4a("u32.u32")


@jit(device=True)
def lane_index():
    """This thread's lane in its warp, of a block in one dimension: int32."""
    return np.int32(cuda.threadIdx.x & 31)


@jit(device=True)
def warp_index():
    """This thread's warp in its block, of a block in one dimension: int32."""
    return np.int32(cuda.threadIdx.x >> 5)


@jit(device=True)
def warp_sum(x):
    """The sum of a float32 over the warp, the same bits in every lane."""
    x += cuda.shfl_xor_sync(FULL, x, 16)
    x += cuda.shfl_xor_sync(FULL, x, 8)
    x += cuda.shfl_xor_sync(FULL, x, 4)
    x += cuda.shfl_xor_sync(FULL, x, 2)
    x += cuda.shfl_xor_sync(FULL, x, 1)
    return x


@jit(device=True)
def warp_sum_int(x):
    """The sum of an int32 over the warp, in every lane."""
    # A sum of two int32 is an int64 to Numba, whose shuffles would cost twice as much.
    x = np.int32(x + cuda.shfl_xor_sync(FULL, x, 16))
    x = np.int32(x + cuda.shfl_xor_sync(FULL, x, 8))
    x = np.int32(x + cuda.shfl_xor_sync(FULL, x, 4))
    x = np.int32(x + cuda.shfl_xor_sync(FULL, x, 2))
    return np.int32(x + cuda.shfl_xor_sync(FULL, x, 1))


@jit(device=True)
def warp_max(x):
    """The largest float32 of the warp, in every lane."""
    x = max(x, cuda.shfl_xor_sync(FULL, x, 16))
    x = max(x, cuda.shfl_xor_sync(FULL, x, 8))
    x = max(x, cuda.shfl_xor_sync(FULL, x, 4))
    x = max(x, cuda.shfl_xor_sync(FULL, x, 2))
    return max(x, cuda.shfl_xor_sync(FULL, x, 1))


@jit(device=True)
def block_sum(x):
    """The sum of a float32 over a block of whole warps, the same bits in every thread. Every thread must call it.

    A kernel must come to it by one device function at most: Numba cannot link its shared array twice.
    """
    parts = cuda.shared.array(MOST_WARPS, types.float32)
    lane = lane_index()
    x = warp_sum(x)
    if lane == 0:
        parts[warp_index()] = x
    cuda.syncthreads()
    x = warp_sum(parts[lane] if lane < cuda.blockDim.x >> 5 else np.float32(0))
    cuda.syncthreads()  # so that the next sum may write
    return x


@jit(device=True)
def block_max(x):
    """The largest float32 of a block of whole warps, in every thread; as `block_sum`."""
    parts = cuda.shared.array(MOST_WARPS, types.float32)
    lane = lane_index()
    x = warp_max(x)
    if lane == 0:
        parts[warp_index()] = x
    cuda.syncthreads()
    x = warp_max(parts[lane] if lane < cuda.blockDim.x >> 5 else _LOWEST)
    cuda.syncthreads()  # so that the next maximum may write
    return x
