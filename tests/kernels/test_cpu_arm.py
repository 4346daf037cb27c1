"""What differs on Arm compiles to Arm code: the dot product's instruction, and the widening of float16."""

from __future__ import annotations

import llvmlite.binding as llvm
import pytest
from llvmlite import ir

from svdengine.kernels.cpu import dot, isa, simd


def arm_assembly(monkeypatch: pytest.MonkeyPatch, emit) -> str:
    """Assembly for a CPU with dot-product instructions of a function whose body `emit(builder, address)` makes."""
    for module in (dot, simd):
        monkeypatch.setattr(module, "ISA", isa.NEON)
    monkeypatch.setattr(dot, "BIAS", 0)
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        target = llvm.Target.from_triple("aarch64-unknown-linux-gnu")
    except RuntimeError:
        pytest.skip("this llvmlite cannot generate Arm code")
    module = ir.Module()
    module.triple = "aarch64-unknown-linux-gnu"
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [simd.I64]), "f")
    builder = ir.IRBuilder(function.append_basic_block())
    emit(builder, function.args[0])
    builder.ret_void()
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    return str(target.create_target_machine(opt=2, features="+neon,+dotprod,+fullfp16").emit_assembly(parsed))


def test_the_dot_product_is_one_instruction_a_register(monkeypatch: pytest.MonkeyPatch) -> None:
    def emit(builder, at) -> None:
        weights = dot.emit_bias(builder, simd.load(builder, at, simd.I8V))
        zero = ir.Constant(simd.I32V, [0] * 16)
        simd.store(builder, at, dot.emit_dot(builder, zero, weights, simd.load(builder, at, simd.I8V, 64)))

    assert arm_assembly(monkeypatch, emit).count("sdot") == 4


@pytest.mark.parametrize("unpack", [dot.emit_nibbles, dot.emit_two_bits, dot.emit_one_bit])
def test_packed_weights_unpack(monkeypatch: pytest.MonkeyPatch, unpack) -> None:
    def emit(builder, at) -> None:
        simd.store(builder, at, unpack(builder, at))

    assert "str" in arm_assembly(monkeypatch, emit)


def test_float16_is_widened_by_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    def emit(builder, at) -> None:
        half = simd.load(builder, at, ir.VectorType(simd.F16, 16))
        simd.store(builder, at, simd.half_to_float(builder, half))

    assert arm_assembly(monkeypatch, emit).count("fcvtl") == 4
