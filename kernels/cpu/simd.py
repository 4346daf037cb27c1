"""SIMD for Numba: vector types and the operations that the kernels are written in.

A vector is 512 bits: 16 float32, 16 int32 or 64 int8. Memory is addressed by plain integers, so that compiled code
has one signature for every weight format; addresses come from arrays that were checked when the model was loaded.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, overload, register_model

from svdengine.kernels.cpu import isa

ISA = isa.active_isa()

F32, F16, I32, I16, I8, I64 = ir.FloatType(), ir.HalfType(), *(ir.IntType(bits) for bits in (32, 16, 8, 64))
F32V, I32V, I8V = ir.VectorType(F32, 16), ir.VectorType(I32, 16), ir.VectorType(I8, 64)


class Vector(types.Type):
    """Numba type of a 512-bit vector."""

    def __init__(self, name: str, llvm: ir.VectorType) -> None:
        self.llvm = llvm
        super().__init__(name=name)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


f32x16 = Vector("f32x16", F32V)


def declare(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: list[ir.Type]) -> ir.Function:
    """An LLVM intrinsic or C function by name, declared once a module."""
    module = builder.module
    return module.globals.get(name) or ir.Function(module, ir.FunctionType(result, arguments), name)


def call(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: list[ir.Value]) -> ir.Value:
    """Call an LLVM intrinsic or C function."""
    return builder.call(declare(builder, name, result, [a.type for a in arguments]), arguments)


def load(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type, offset: int = 0) -> ir.Value:
    """Unaligned load of `kind` at an integer address, `offset` bytes on."""
    if offset:
        address = builder.add(address, ir.Constant(I64, offset))
    value = builder.load(builder.inttoptr(address, kind.as_pointer()), typ=kind)
    value.align = 1
    return value


def store(builder: ir.IRBuilder, address: ir.Value, value: ir.Value) -> None:
    """Unaligned store at an integer address."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = 1


def splat(builder: ir.IRBuilder, scalar: ir.Value, lanes: int = 16) -> ir.Value:
    """The scalar in every lane."""
    kind = ir.VectorType(scalar.type, lanes)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
    return shuffle(builder, first, first, [0] * lanes)


def shuffle(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, lanes: list[int]) -> ir.Value:
    """Lanes of a, then of b, in the order given."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def fused(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a * b + c with one rounding where the hardware can, and always alike: results must not depend on the caller."""
    name = "llvm.fmuladd.v16f32" if isinstance(a.type, ir.VectorType) else "llvm.fmuladd.f32"
    return call(builder, name, a.type, [a, b, c])


def half_to_float(builder: ir.IRBuilder, half: ir.Value) -> ir.Value:
    """Vector or scalar float16 to float32; the portable way is integer arithmetic, since LLVM would call a library."""
    vector = isinstance(half.type, ir.VectorType)

    def like(kind: ir.Type) -> ir.Type:
        return ir.VectorType(kind, half.type.count) if vector else kind

    def constant(kind: ir.Type, value: float) -> ir.Constant:
        return ir.Constant(like(kind), [value] * half.type.count if vector else value)

    if ISA != isa.PORTABLE:
        return builder.fpext(half, like(F32))
    bits = builder.zext(builder.bitcast(half, like(I16)), like(I32))
    magnitude = builder.shl(builder.and_(bits, constant(I32, 0x7FFF)), constant(I32, 13))
    scaled = builder.fmul(builder.bitcast(magnitude, like(F32)), constant(F32, 2.0**112))
    sign = builder.shl(builder.and_(bits, constant(I32, 0x8000)), constant(I32, 16))
    return builder.bitcast(builder.or_(builder.bitcast(scaled, like(I32)), sign), like(F32))


def float_to_half(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Scalar float32 to float16, to nearest even, as int16; beyond the range it becomes infinity."""
    if ISA != isa.PORTABLE:
        return builder.bitcast(builder.fptrunc(x, F16), I16)
    bits = builder.bitcast(x, I32)
    sign = builder.and_(builder.lshr(bits, ir.Constant(I32, 16)), ir.Constant(I32, 0x8000))
    magnitude = builder.bitcast(builder.and_(bits, ir.Constant(I32, 0x7FFFFFFF)), F32)
    # Adding 2^(e + 13 - 23) rounds at float16's last place; a tiny number rounds at the subnormal step instead.
    exponent = builder.and_(builder.bitcast(magnitude, I32), ir.Constant(I32, 0x7F800000))
    floor = ir.Constant(I32, (127 - 14) << 23)
    exponent = builder.select(builder.icmp_unsigned("<", exponent, floor), floor, exponent)
    magic = builder.bitcast(builder.add(exponent, ir.Constant(I32, 13 << 23)), F32)
    rounded = builder.fsub(builder.fadd(magnitude, magic), magic)
    scaled = builder.bitcast(builder.fmul(rounded, ir.Constant(F32, 2.0**-112)), I32)
    half = builder.lshr(scaled, ir.Constant(I32, 13))
    top = ir.Constant(I32, 0x7C00)
    half = builder.select(builder.icmp_unsigned("<", half, top), half, top)
    return builder.trunc(builder.or_(half, sign), I16)


def loop(
    builder: ir.IRBuilder,
    count: ir.Value,
    carried: list[ir.Value],
    body: Callable[[ir.Value, list[ir.Value]], list[ir.Value]],
) -> list[ir.Value]:
    """Run `body(i, values) -> values` for i in 0..count (at least once) and return the last values."""
    before = builder.block
    top, done = builder.append_basic_block("top"), builder.append_basic_block("done")
    builder.branch(top)
    builder.position_at_end(top)
    i = builder.phi(I64)
    values: list[Any] = [builder.phi(value.type) for value in carried]
    results = body(i, values)
    following = builder.add(i, ir.Constant(I64, 1))
    i.add_incoming(ir.Constant(I64, 0), before)
    i.add_incoming(following, builder.block)
    for phi, first, result in zip(values, carried, results, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(result, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, count), top, done)
    builder.position_at_end(done)
    return results


def operation(result: Any, *arguments: Any) -> Callable[[Callable[..., ir.Value | None]], Any]:
    """Make a Numba function of these types out of an emitter `emit(builder, *values) -> value`."""

    def decorate(emit: Callable[..., ir.Value | None]) -> Any:
        signature = result(*arguments)

        def codegen(context: Any, builder: ir.IRBuilder, _: Any, values: tuple[ir.Value, ...]) -> ir.Value:
            value = emit(builder, *values)
            return context.get_dummy_value() if value is None else value

        parameters = ", ".join(f"a{i}" for i in range(len(arguments)))
        scope = {"signature": signature, "codegen": codegen}
        # An intrinsic's typing function needs named parameters, as many as the operation has.
        exec(f"def {emit.__name__}(typing_context, {parameters}):\n    return signature, codegen", scope)
        function = scope[emit.__name__]
        function.__doc__ = emit.__doc__
        function.__module__ = emit.__module__
        made: Any = intrinsic(function)
        made.emit = emit  # for who wants its code alone
        return made

    return decorate


address, index, real = types.int64, types.int64, types.float32


@operation(f32x16, address)
def load_f32(builder, at):
    """16 float32."""
    return load(builder, at, F32V)


@operation(types.void, address, f32x16)
def store_f32(builder, at, value):
    """16 float32."""
    store(builder, at, value)


def emit_f16(builder: ir.IRBuilder, at: ir.Value, offset: int = 0) -> ir.Value:
    """16 float16, widened."""
    return half_to_float(builder, load(builder, at, ir.VectorType(F16, 16), offset))


def emit_bf16(builder: ir.IRBuilder, at: ir.Value, offset: int = 0) -> ir.Value:
    """16 bfloat16, widened."""
    wide = builder.zext(load(builder, at, ir.VectorType(I16, 16), offset), I32V)
    return builder.bitcast(builder.shl(wide, ir.Constant(I32V, [16] * 16)), F32V)


@operation(f32x16, address)
def load_f16(builder, at):
    """16 float16, widened."""
    return emit_f16(builder, at)


@operation(f32x16, address)
def load_bf16(builder, at):
    """16 bfloat16, widened."""
    return emit_bf16(builder, at)


@operation(f32x16, address)
def load_u8_as_f32(builder, at):
    """16 unsigned bytes, converted."""
    return builder.uitofp(load(builder, at, ir.VectorType(I8, 16)), F32V)


@operation(f32x16, real)
def splat_f32(builder, x):
    """x in every lane."""
    return splat(builder, x)


@operation(f32x16)
def zero_f32(builder):
    """0 in every lane."""
    return ir.Constant(F32V, [0.0] * 16)


@operation(f32x16, f32x16, f32x16, f32x16)
def fma(builder, a, b, c):
    """a * b + c."""
    return fused(builder, a, b, c)


@operation(f32x16, f32x16, f32x16)
def maximum_f32(builder, a, b):
    """Larger of each lane."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@operation(f32x16, f32x16, f32x16)
def minimum_f32(builder, a, b):
    """Smaller of each lane."""
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


@operation(f32x16, f32x16)
def absolute_f32(builder, a):
    """|a|."""
    return call(builder, "llvm.fabs.v16f32", F32V, [a])


@operation(real, f32x16)
def sum_lanes(builder, a):
    """Sum over the lanes, pairwise."""
    for half in (8, 4, 2, 1):
        a = builder.fadd(shuffle(builder, a, a, list(range(half))), shuffle(builder, a, a, list(range(half, 2 * half))))
    return builder.extract_element(a, ir.Constant(I32, 0))


@operation(real, f32x16)
def first_lane(builder, a):
    """Lane 0."""
    return builder.extract_element(a, ir.Constant(I32, 0))


@operation(real, f32x16)
def max_lanes(builder, a):
    """Largest lane."""
    for half in (8, 4, 2, 1):
        low, high = (shuffle(builder, a, a, list(range(s, s + half))) for s in (0, half))
        a = builder.select(builder.fcmp_ordered(">", low, high), low, high)
    return builder.extract_element(a, ir.Constant(I32, 0))


@operation(f32x16, f32x16)
def exp_f32(builder, x):
    """e^x to about 1e-7 relative; the argument is clamped to the range of normal numbers."""

    def constant(value: float) -> ir.Constant:
        return ir.Constant(F32V, [value] * 16)

    for bound, keep in ((88.0, "<"), (-87.0, ">")):
        x = builder.select(builder.fcmp_ordered(keep, x, constant(bound)), x, constant(bound))
    n = call(builder, "llvm.rint.v16f32", F32V, [builder.fmul(x, constant(1.4426950408889634))])
    # x - n ln 2 in two parts, so that no digit is lost.
    r = fused(builder, n, constant(-0.693359375), x)
    r = fused(builder, n, constant(2.12194440e-4), r)
    p = constant(1.0 / 5040)
    for coefficient in (1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0):
        p = fused(builder, p, r, constant(coefficient))
    exponent = builder.shl(
        builder.add(builder.fptosi(n, I32V), ir.Constant(I32V, [127] * 16)), ir.Constant(I32V, [23] * 16)
    )
    return builder.fmul(p, builder.bitcast(exponent, F32V))


@operation(f32x16, f32x16)
def round_f32(builder, a):
    """To the nearest whole number, ties to even."""
    return call(builder, "llvm.rint.v16f32", F32V, [a])


@operation(types.void, address, f32x16)
def store_whole_i8(builder, at, value):
    """16 whole numbers in -128..127 as int8."""
    store(builder, at, builder.trunc(builder.fptosi(value, I32V), ir.VectorType(I8, 16)))


@operation(real, address)
def load_real(builder, at):
    """One float32."""
    return load(builder, at, F32)


@operation(types.void, address, real)
def store_real(builder, at, x):
    """One float32."""
    store(builder, at, x)


@operation(real, address)
def load_half(builder, at):
    """One float16, widened."""
    return half_to_float(builder, load(builder, at, F16))


@operation(types.void, address, real)
def store_half(builder, at, x):
    """One float16, rounded to nearest even."""
    store(builder, at, float_to_half(builder, x))


def emit_prefetch(builder: ir.IRBuilder, at: ir.Value) -> None:
    """Ask for the cache line of an address; it need not exist."""
    pointer = builder.inttoptr(at, I8.as_pointer())
    hints = [ir.Constant(I32, value) for value in (0, 2, 1)]  # read, into the second level, data
    name = "llvm.prefetch.p0" if "p0i8" not in str(pointer.type) else "llvm.prefetch.p0i8"
    function = declare(builder, name, ir.VoidType(), [pointer.type, I32, I32, I32])
    builder.call(function, [pointer, *hints])


@operation(types.void, address)
def prefetch(builder, at):
    """Ask for the cache line of an address; it need not exist."""
    emit_prefetch(builder, at)


def _binary(emit_name: str) -> Any:
    @operation(f32x16, f32x16, f32x16)
    def binary(builder, a, b):
        """Lane by lane."""
        return getattr(builder, emit_name)(a, b)

    return binary


def _overload(python_operator: Any, implementation: Any) -> None:
    @overload(python_operator)
    def choose(a, b):
        if a is f32x16 and b is f32x16:
            return lambda a, b: implementation(a, b)
        return None


for _operator, _name in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _overload(_operator, _binary(_name))


@operation(f32x16, f32x16, f32x16, f32x16, f32x16)
def select_greater(builder, a, b, then, otherwise):
    """`then` where a > b, else `otherwise`."""
    return builder.select(builder.fcmp_ordered(">", a, b), then, otherwise)


@operation(f32x16, f32x16, f32x16)
def copy_sign(builder, size, sign):
    """Size of the first, sign of the second."""
    return call(builder, "llvm.copysign.v16f32", F32V, [size, sign])


@operation(real, address)
def load_u8_as_real(builder, at):
    """One unsigned byte, converted."""
    return builder.uitofp(load(builder, at, I8), F32)


@operation(types.int64, address)
def load_int(builder, at):
    """One int32, widened."""
    return builder.sext(load(builder, at, I32), I64)


@operation(types.void, address, types.int64)
def store_int(builder, at, value):
    """One int32."""
    store(builder, at, builder.trunc(value, I32))


@operation(types.void, address, types.int64)
def store_address(builder, at, value):
    """One int64."""
    store(builder, at, value)
