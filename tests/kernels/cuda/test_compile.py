"""Every kernel compiles for each architecture, and what a thread uses stays in registers. No GPU is needed."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from compiled import stays_in_registers

from svdengine.kernels import cuda as package
from svdengine.kernels.cuda.catalogue import all_kernels

pytestmark = pytest.mark.slow
KERNELS = all_kernels()
REGISTERS = 128  # of a thread: a block of 512 fits, and two of 256
ATTENTION_REGISTERS = 255  # two blocks of 128 fit
SMALL_BLOCKS, SMALL_BLOCK_REGISTERS = ("batch_", "gemv_f32", "route_"), 168  # of 128 threads: three fit
FULL_BLOCKS = ("list_every", "project_")  # of 1024 threads, which have half as many
MOST_SHARED = 48 * 1024
# Kernels that read weights or the KV cache: their loads must be of 16 bytes.
ATTENTION = ("attention_128", "attention_64", "attention_80", "attention_256")  # without tensor cores
WIDE = (*ATTENTION, "gemv_", "gate_", "up_", "down_", "project_", "score_q8", "score_q4", "score_none_2")
WIDE += ("heads_", "normed_", "activated_", "predicted_", "route_")


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_compiles_and_stays_in_registers(machine_code_report: Any, name: str) -> None:
    assert "error" not in machine_code_report[name], machine_code_report[name]["error"]
    for architecture, used in machine_code_report[name].items():
        assert stays_in_registers(name, used), f"{architecture}: {used}"
        assert used["REG"] <= most_registers(name), f"{architecture}: {used}"
        assert used["SHARED"] <= MOST_SHARED, f"{architecture}: {used}"
        # Of GPUs where kernels may start early, all wait first; others know no such instruction.
        assert used["before_wait"] == (0 if architecture >= "sm_9" or len(architecture) > 6 else -1), architecture
        if name.startswith(WIDE):
            assert used["wide_loads"] > 0, f"{architecture}: {used}"


def test_no_kernel_is_missing_from_the_catalogue() -> None:
    written = {
        (path.name, node.name)
        for path in Path(package.__path__[0]).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and any(map(makes_kernel, node.decorator_list))
    }
    known = {(Path(code.co_filename).name, code.co_name) for code in map(code_of, KERNELS.values())}
    assert written == known


def makes_kernel(decorator: ast.expr) -> bool:
    """Whether it is `kernel(...)`, or cuda.jit itself, which no kernel should be made with."""
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(called) in ("kernel", "intrinsics.kernel", "cuda.jit")


def code_of(kernel: Any) -> Any:
    return kernel.dispatcher.py_func.__code__


def most_registers(name: str) -> int:
    """Of a thread, so that the blocks that it is launched with fit."""
    if name.startswith("attention_"):
        return ATTENTION_REGISTERS
    if name.startswith(SMALL_BLOCKS):
        return SMALL_BLOCK_REGISTERS
    return 64 if name.startswith(FULL_BLOCKS) else REGISTERS
