"""What the machine code of the kernels that multiply says of their speed, for every kind of GPU. No GPU is needed.

Memory is waited for with few loads on their way, and with too many instructions a byte or a multiply-add.
"""

from __future__ import annotations

from typing import Any

import machine_code
import pytest
from compiled import BATCH, DECODE, IN_FLIGHT, PREFILL, TARGETS, stays_in_registers

from svdengine.kernels.cuda import batch_products, batch_sums
from svdengine.kernels.formats import FORMATS

pytestmark = pytest.mark.slow
MOST_PER_MULTIPLY_ADD = 3.0  # instructions
MOST_PER_MMA = 8.0


# The least bytes of weights for each instruction of a warp. Sums of rows of down keep float32 activations.
BYTES = {
    "gemv_f16_1x1": 16,
    "gemv_q8_1x1": 8,
    "gemv_q8_4x1": 8,
    "gate_up_q8": 8,
    "gemv_q4_1x1": 8,
    "gemv_q4_4x1": 8,
    "gate_up_q4": 7,
    "down_q8": 6,
    "down_q4": 3.3,
    "gemv_transposed_q4_1": 3.3,
}


def main_loop(used: dict[str, Any], by: str) -> dict[str, int]:
    """The loop that has most of something."""
    found: dict[str, int] = max(used["loops"], key=lambda loop: loop[by])
    return found


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", IN_FLIGHT)
def test_loads_of_weights_are_on_their_way_together(machine_code_report: Any, name: str, target: str) -> None:
    assert "error" not in machine_code_report[name], machine_code_report[name]["error"]
    used = machine_code_report[name][target]
    assert max(loop["in_flight"] for loop in used["loops"]) >= IN_FLIGHT[name], used
    assert stays_in_registers(name, used), used


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", BYTES)
def test_a_byte_of_weights_takes_few_instructions(machine_code_report: Any, name: str, target: str) -> None:
    loops = machine_code_report[name][target]["loops"]
    assert max(512 * loop["weight_loads"] / loop["instructions"] for loop in loops) >= BYTES[name], loops


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", DECODE)
def test_decode_attention_is_multiply_adds(machine_code_report: Any, name: str, target: str) -> None:
    assert "error" not in machine_code_report[name], machine_code_report[name]["error"]
    used = machine_code_report[name][target]
    loop = main_loop(used, "ffma")
    assert loop["ffma"] >= 128 and loop["instructions"] <= MOST_PER_MULTIPLY_ADD * loop["ffma"], used
    assert stays_in_registers(name, used), used


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", PREFILL)
def test_prefill_attention_is_on_tensor_cores(machine_code_report: Any, name: str, target: str) -> None:
    assert "error" not in machine_code_report[name], machine_code_report[name]["error"]
    used = machine_code_report[name][target]
    loop = main_loop(used, "mma")
    assert loop["mma"] >= 40 and loop["instructions"] <= MOST_PER_MMA * loop["mma"], used
    assert stays_in_registers(name, used), used


# The same of products with 8 rows of activations at once: all instructions of the loop, of which 8 rows share most.
BATCH_BYTES = {"batch_q8_1": 11, "batch_f16_1": 11, "batch_q4_1": 5, "batch_sums_q8_1": 4.4, "batch_sums_q4_1": 2.6}
MOST_BATCH_REGISTERS = 128  # four blocks fit


def turns_of(name: str) -> tuple[int, int, int]:
    """Of a batch kernel's loop: turns, bytes of weights of a turn, and products of tensor cores."""
    *kind, stored, tiles = name.split("_")
    weight_format = next(known for known in FORMATS if known == stored)
    row, several = FORMATS[weight_format].row_bytes(64), int(tiles)
    if "sums" in kind:  # 64 columns are four times 16, in two parts
        return batch_sums.TURNS, 16 * row, 8 * several
    room = batch_products.room_of(weight_format, several)
    # Two groups of 32 columns, for each 16 rows and 8 of activations two products of bytes, or four of 16 bits.
    return room.turns, room.rows * row, 2 * room.rows // 16 * several * (2 if room.rows == 32 else 4)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", BATCH)
def test_several_rows_are_on_tensor_cores(machine_code_report: Any, name: str, target: str) -> None:
    assert "error" not in machine_code_report[name], machine_code_report[name]["error"]
    used = machine_code_report[name][target]
    loop, (turns, weights, products) = main_loop(used, "mma"), turns_of(name)
    assert loop["mma"] == turns * products, used
    assert loop["copies"] >= turns * weights // 512, used  # 16 bytes a lane
    assert (turns - 1) * weights >= 1024  # on their way, a warp
    assert turns * weights >= BATCH_BYTES[name] * loop["instructions"], used
    assert used["REG"] <= MOST_BATCH_REGISTERS and stays_in_registers(name, used), used


CODE = """
.text.k:
        /*0000*/                   LDC R1, c[0x0][0x37c] ;
.L_x_0:
        /*0010*/                   LDG.E.NA.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.NA.128.CONSTANT R8, desc[UR4][R2.64+0x200] ;
        /*0030*/                   LDG.E.128.CONSTANT R12, desc[UR4][R20.64] ;
        /*0040*/                   FFMA R0, R5, R12, R0 ;
        /*0050*/                   LDG.E.NA.128.CONSTANT R16, desc[UR4][R2.64+0x400] ;
        /*0060*/                   FFMA R0, R9, R13, R0 ;
        /*0070*/                   FFMA R0, R17, R13, R0 ;
        /*0080*/              @!P0 BRA `(.L_x_0) ;
        /*0090*/                   STG.E desc[UR4][R2.64], R0 ;
        /*00a0*/                   EXIT ;
.L_x_1:
        /*00b0*/                   BRA `(.L_x_1) ;
"""


def test_a_wait_is_found_where_it_stands() -> None:
    assert machine_code.memory_before_wait(CODE) == -1
    first, last = "/*0000*/ ACQBULK ;", "/*00c0*/ ACQBULK ;"
    assert machine_code.memory_before_wait(first + "\n" + CODE) == 0
    assert machine_code.memory_before_wait(CODE + last) == 7  # loads, a store and branches


def test_loops_and_loads_are_counted() -> None:
    (loop,) = machine_code.inner_loops(CODE)
    assert machine_code.summary(loop) == {
        "instructions": 8, "weight_loads": 3, "in_flight": 2, "ffma": 3, "mma": 0, "copies": 0, "dp4a": 0
    }  # fmt: skip


def test_branches_to_addresses_are_loops_too() -> None:
    """Of the second of two kernels that were disassembled together; the last instruction stands still."""
    pytest.importorskip("cuda.pathfinder", reason="needs cuda-pathfinder: pip install 'svdengine[test]'")
    from disassembly import with_labels

    lines = ["S2R R2, SR_TID.X ;", "FFMA R0, R5, R12, R0 ;", "@!P1 BRA P2, 0x110 ;", "BRA 0x130;"]
    instructions = [(0x100 + 16 * i, f"        /*{0x100 + 16 * i:04x}*/    {line}") for i, line in enumerate(lines)]
    (loop,) = machine_code.inner_loops(with_labels(instructions))
    assert [instruction.name for instruction in loop.instructions] == ["FFMA", "BRA"]
