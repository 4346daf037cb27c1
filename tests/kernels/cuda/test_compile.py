"""Every kernel compiles for each architecture, and what a thread uses stays in registers. No GPU is needed."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from svdengine.kernels import cuda as package
from svdengine.kernels.cuda.catalogue import all_kernels

KERNELS = all_kernels()
ARCHITECTURES = ("sm_80", "sm_90a")
REGISTERS = 128  # of a thread: a block of 512 fits, and two of 256
FULL_BLOCKS = ("list_every", "project_")  # of 1024 threads, which have half as many
MOST_SHARED = 48 * 1024
# Kernels that read weights or the KV cache: their loads must be of 16 bytes.
WIDE = ("attention_", "gemv_", "gate_", "up_", "down_", "project_", "score_q8", "score_q4", "score_none_2")
PROCESSES = 2


@pytest.fixture(scope="module")
def report() -> dict[str, dict[str, Any]]:
    """What offline.py says of every kernel. It runs outside the simulator, so in processes of its own."""
    pathfinder = pytest.importorskip("cuda.pathfinder", reason="needs cuda-pathfinder: pip install 'svdengine[test]'")
    for tool in ("cuobjdump", "nvdisasm"):
        if pathfinder.find_nvidia_binary_utility(tool) is None:
            pytest.skip(f"needs {tool}: pip install 'svdengine[test]'")
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"}
    program, names = str(Path(__file__).parent / "offline.py"), list(KERNELS)
    started = [
        subprocess.Popen([sys.executable, program, *names[i::PROCESSES]], env=environment, stdout=subprocess.PIPE)
        for i in range(PROCESSES)
    ]
    found: dict[str, dict[str, Any]] = {}
    for process in started:
        out, _ = process.communicate(timeout=500)
        assert process.returncode == 0
        found |= json.loads(out)
    return found


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_compiles_and_stays_in_registers(report: dict[str, dict[str, Any]], name: str) -> None:
    assert "error" not in report[name], report[name]["error"]
    for architecture in ARCHITECTURES:
        used = report[name][architecture]
        assert used["STACK"] == used["LOCAL"] == used["spills"] == 0, f"{architecture}: {used}"
        assert used["REG"] <= (64 if name.startswith(FULL_BLOCKS) else REGISTERS), f"{architecture}: {used}"
        assert used["SHARED"] <= MOST_SHARED, f"{architecture}: {used}"
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
