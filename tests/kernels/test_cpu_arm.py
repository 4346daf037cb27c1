"""What the kernels become on Arm, without one: which instructions, how many of them, and that they are made at all."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llvmlite.binding as llvm
import pytest
from llvmlite import ir

from svdengine.kernels.cpu import arm_features, dot, isa, panel_product, simd, tile
from svdengine.kernels.cpu.compilation import compile_parts
from svdengine.kernels.cpu.kernel_files import read_kernels
from svdengine.kernels.cpu.parts import BANDWIDTH
from svdengine.kernels.formats import WeightFormat

TRIPLE = "aarch64-unknown-linux-gnu"


def arm_assembly(monkeypatch: pytest.MonkeyPatch, emit: Callable[..., Any], name: str, arguments: int = 1) -> str:
    """Assembly for an instruction set of a function of int64 whose body `emit(builder, *arguments)` makes."""
    for module in (dot, simd, tile, panel_product):
        monkeypatch.setattr(module, "ISA", name)
    for module in (dot, panel_product):
        monkeypatch.setattr(module, "BIAS", isa.weight_bias(name))
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        target = llvm.Target.from_triple(TRIPLE)
    except RuntimeError:
        pytest.skip("this llvmlite cannot generate Arm code")
    module = ir.Module()
    module.triple = TRIPLE
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [simd.I64] * arguments), "f")
    builder = ir.IRBuilder(function.append_basic_block())
    emit(builder, *function.args)
    builder.ret_void()
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    cpu, features = isa.target_of(name)
    return str(target.create_target_machine(cpu=cpu, opt=2, features=features, reloc="pic").emit_assembly(parsed))


def loop_of(assembly: str) -> Counter[str]:
    """How often each instruction stands in the only loop, and `spill` what of it goes to the stack."""
    lines, labels = [line.strip() for line in assembly.splitlines()], {}
    for i, line in enumerate(lines):
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = i
        branch = re.match(r"(?:b\.\w+|cbn?z\s+\w+,|tbn?z\s+\w+, #\d+,)\s+(\.LBB\w+)", line)
        if branch and branch[1] in labels:
            inside = [line for line in lines[labels[branch[1]] : i + 1] if re.match(r"[a-z]", line)]
            found = Counter(line.split()[0] for line in inside)
            found["spill"] = sum("[sp" in line and "q" in line for line in inside)
            return found
    raise AssertionError("there is no loop")


@pytest.mark.parametrize("name", isa.ARM_ISAS)
def test_the_dot_product_is_one_instruction_a_register(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def emit(builder, at) -> None:
        weights = dot.emit_bias(builder, simd.load(builder, at, simd.I8V))
        zero = ir.Constant(simd.I32V, [0] * 16)
        simd.store(builder, at, dot.emit_dot(builder, zero, weights, simd.load(builder, at, simd.I8V, 64)))

    assert arm_assembly(monkeypatch, emit, name).count("sdot") == 4


@pytest.mark.parametrize("unpack", [dot.emit_nibbles, dot.emit_two_bits, dot.emit_one_bit])
def test_packed_weights_unpack(monkeypatch: pytest.MonkeyPatch, unpack) -> None:
    def emit(builder, at) -> None:
        simd.store(builder, at, unpack(builder, at))

    assert "str" in arm_assembly(monkeypatch, emit, isa.NEON)


def test_float16_is_widened_by_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    def emit(builder, at) -> None:
        half = simd.load(builder, at, ir.VectorType(simd.F16, 16))
        simd.store(builder, at, simd.half_to_float(builder, half))

    assert arm_assembly(monkeypatch, emit, isa.NEON).count("fcvtl") == 4


# Instructions of a panel's loop for each byte of weights, with one and two rows of activations, and 3 % more: LLVM's
# versions differ. Before there was code for Arm alone it was 0.31 and 0.56 for q8, 1.00 and 1.55 for q6, 1.02 and 1.76
# for q4.
LIMITS: dict[tuple[str, WeightFormat], tuple[float, float]] = {
    (isa.I8MM, "q8"): (0.225, 0.42), (isa.I8MM, "q6"): (0.84, 1.23), (isa.I8MM, "q4"): (0.80, 1.24),
    (isa.NEON, "q8"): (0.265, 0.47), (isa.NEON, "q6"): (0.85, 1.44), (isa.NEON, "q4"): (0.83, 1.54),
}  # fmt: skip


@pytest.mark.parametrize("name", isa.ARM_ISAS)
@pytest.mark.parametrize("weight_format", ["q8", "q6", "q4"])
@pytest.mark.parametrize("rows", [1, 2])
def test_instructions_for_each_byte_of_weights(
    monkeypatch: pytest.MonkeyPatch, name: str, weight_format: WeightFormat, rows: int
) -> None:
    emit = panel_product.panel_tile(weight_format, rows).emit
    found = loop_of(arm_assembly(monkeypatch, emit, name, 10))
    # smmla multiplies a register of weights with both planes of a row of activations, sdot with one.
    dots = {"smmla": 64 * rows, "sdot": 0} if name == isa.I8MM else {"smmla": 0, "sdot": 128 * rows}
    assert {instruction: found[instruction] for instruction in dots} == dots
    each = (found.total() - found["spill"]) / (16 * panel_product._ROW_BYTES[weight_format])
    assert each <= LIMITS[name, weight_format][rows - 1]


@pytest.mark.parametrize("name", isa.ARM_ISAS)
def test_another_machine_s_kernels_are_made_here(tmp_path: Path, name: str) -> None:
    try:
        llvm.initialize_all_targets()
        llvm.Target.from_triple(TRIPLE)
    except RuntimeError:
        pytest.skip("this llvmlite cannot generate Arm code")
    compile_parts([BANDWIDTH], name, tmp_path)
    code = read_kernels(tmp_path, BANDWIDTH)
    assert code is not None
    if code[:4] == b"\x7fELF":
        assert int.from_bytes(code[18:20], "little") == 183  # AArch64


def test_linux_says_what_an_arm_cpu_has() -> None:
    def library(hwcap: int, hwcap2: int) -> Any:
        class Function:
            def __call__(self, kind: int) -> int:
                return {16: hwcap, 26: hwcap2}[kind]

        return SimpleNamespace(getauxval=Function())

    # A Raspberry Pi 4, a 5, and an AWS Graviton 3.
    pi4, pi5, graviton = (0x8FF, 0), (0x119FFF, 0), (0xEFFFFFFF, 0x1FE00F)
    found = [arm_features._from_auxiliary_vector(library(*words)) for words in (pi4, pi5, graviton)]
    assert "dotprod" not in found[0] and "neon" in found[0]
    assert found[1] >= {"dotprod", "lse"} and "i8mm" not in found[1]
    assert found[2] >= {"dotprod", "i8mm", "bf16", "sve"}


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"neon"}, (isa.PORTABLE,)),
        ({"neon", "dotprod"}, (isa.NEON, isa.PORTABLE)),
        ({"neon", "dotprod", "i8mm"}, (isa.I8MM, isa.NEON, isa.PORTABLE)),
    ],
)
def test_the_best_that_an_arm_cpu_has_is_chosen(
    monkeypatch: pytest.MonkeyPatch, features: set[str], expected: tuple[str, ...]
) -> None:
    monkeypatch.setattr(isa, "_ARM", True)
    monkeypatch.setattr(isa, "host_features", lambda: frozenset(features))
    assert isa.supported_isas() == expected
