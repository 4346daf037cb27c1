"""What kernels are compiled to: offline.py, which runs outside the simulator, in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from svdengine.kernels.cuda.catalogue import all_kernels

PROCESSES = 2
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")
FEW_TARGETS = ("sm_80", "sm_90a")  # of most kernels
# Of decode steps of one row (kernels/cuda/single_row.py and predicted.py): names before and behind the format's.
SINGLE_ROW = (("heads", "_f16"), ("normed", ""), ("activated", ""), ("predicted_q8_0", ""))
# Kernels that a step's time goes to, with the least loads of weights that a lane has on their way at once.
IN_FLIGHT = {
    "gemv_f16_1x1": 4,
    "gemv_f16_4x1": 4,
    "gemv_q8_1x1": 4,
    "gemv_q8_4x1": 4,
    "gemv_q4_1x1": 2,
    "gemv_q4_4x1": 2,
    "gate_up_f16": 4,
    "gate_up_q8": 4,
    "gate_up_q4": 2,
    "down_f16": 4,
    "down_q8": 4,
    "down_q4": 2,
    **{f"{name}_f16{cache}": 4 for name, cache in SINGLE_ROW},
    **{f"{name}_q8{cache}": 4 for name, cache in SINGLE_ROW},
    **{f"{name}_q4{cache}": 2 for name, cache in SINGLE_ROW},
    "gemv_transposed_f16_1": 4,
    "gemv_transposed_q8_1": 4,
    "gemv_transposed_q4_1": 2,
}
DECODE = ("attention_128_1x1_f16", "attention_128_1x8_f16")
PREFILL = ("attention_tiles_128_1",)
BATCH = ("batch_q8_1", "batch_f16_1", "batch_q4_1", "batch_sums_q8_1", "batch_sums_q4_1")  # several rows of activations
# Kernels that do not fit into their registers on some target: most loads and stores of a thread's own memory there.
# BENCHMARKS.md has them among the misses.
SPILLS = {
    "gate_up_ternary": 4,  # on sm_80 and sm_100a
    "activated_f32": 4,  # but on sm_100a and sm_120a
}
HOT = (*IN_FLIGHT, *DECODE, *PREFILL, *BATCH)


def compile_everything() -> dict[str, dict[str, Any]]:
    """What `compile_all` says of every kernel, for all targets of those in HOT."""
    names = all_kernels()
    return compile_all(HOT, TARGETS) | compile_all([name for name in names if name not in HOT], FEW_TARGETS)


def compile_all(names: Sequence[str], targets: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What offline.py says of kernels for targets. Skips the test where there is nothing to read machine code with."""
    pathfinder = pytest.importorskip("cuda.pathfinder", reason="needs cuda-pathfinder: pip install 'svdengine[test]'")
    for tool in ("cuobjdump", "nvdisasm"):
        if pathfinder.find_nvidia_binary_utility(tool) is None:
            pytest.skip(f"needs {tool}: pip install 'svdengine[test]'")
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"}
    program = str(Path(__file__).parent / "offline.py")
    started = [
        subprocess.Popen(
            [sys.executable, program, *names[i::PROCESSES], "--for", *targets], env=environment, stdout=subprocess.PIPE
        )
        for i in range(min(PROCESSES, len(names)))
    ]
    found: dict[str, dict[str, Any]] = {}
    for process in started:
        out, _ = process.communicate(timeout=1800)
        assert process.returncode == 0
        found |= json.loads(out)
    return found


def stays_in_registers(name: str, used: dict[str, Any]) -> bool:
    """Whether a kernel's code for one target has no memory of a thread's own, or no more than is known of it."""
    if name in SPILLS:
        return bool(used["spills"] <= SPILLS[name])
    return bool(used["STACK"] == used["LOCAL"] == used["spills"] == 0)
