"""What kernels are compiled to: offline.py, which runs outside the simulator, in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest

from svdengine.kernels.cuda.catalogue import all_kernels
from svdengine.kernels.cuda.compact import COMPACT_THREADS
from svdengine.kernels.cuda.compilation import TARGETS as EVERY_TARGET
from svdengine.kernels.cuda.score import PROJECT_THREADS

PROCESSES, SHARES = 2, 8  # that compile at once; what they take, so that they end at about the same time
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
    "gemv_ternary_1x1": 2,  # on sm_80
}
HOT = (*IN_FLIGHT, *DECODE, *PREFILL, *BATCH)
# Kernels by the threads of their blocks: a multiprocessor has 65,536 registers.
THREADS = {"list_every": COMPACT_THREADS, "project_q8": PROJECT_THREADS, "project_q4": PROJECT_THREADS}
FLOAT32 = ("spread",)  # that goes over a whole vocabulary
NEAR_A_LIMIT = tuple(dict.fromkeys([*THREADS, *FLOAT32, *SPILLS]))


def compile_everything() -> dict[str, dict[str, Any]]:
    """What `compile_all` says of every kernel, for all targets of those that a target may make a difference to."""
    return compile_all({name: targets_of(name) for name in all_kernels()})


def targets_of(name: str) -> Sequence[str]:
    """What a kernel is compiled for. Tests marked `long` compile all for all."""
    if name in NEAR_A_LIMIT:
        return tuple(EVERY_TARGET)
    return TARGETS if name in HOT else FEW_TARGETS


def compile_all(wanted: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """What offline.py says of kernels for targets. Skips the test where there is nothing to read machine code with."""
    pathfinder = pytest.importorskip("cuda.pathfinder", reason="needs cuda-pathfinder: pip install 'svdengine[test]'")
    for tool in ("cuobjdump", "nvdisasm"):
        if pathfinder.find_nvidia_binary_utility(tool) is None:
            pytest.skip(f"needs {tool}: pip install 'svdengine[test]'")
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"}
    command = [sys.executable, str(Path(__file__).parent / "offline.py")]
    with ThreadPoolExecutor(PROCESSES) as pool:
        asked = [
            pool.submit(subprocess.run, command, input=json.dumps(share), env=environment, stdout=PIPE, text=True)
            for share in _shares(wanted)
        ]
    found: dict[str, dict[str, Any]] = {}
    for done in (each.result() for each in asked):
        assert done.returncode == 0
        found |= json.loads(done.stdout)
    return found


def _shares(wanted: Mapping[str, Sequence[str]]) -> list[dict[str, Sequence[str]]]:
    """What each process compiles, of about the same work: kernels of a module share functions and stay together."""
    modules: dict[str, dict[str, Sequence[str]]] = {}
    for name, kernel in all_kernels().items():
        if name in wanted:
            modules.setdefault(kernel.module, {})[name] = wanted[name]
    shares: list[dict[str, Sequence[str]]] = [{} for _ in range(SHARES)]
    for kernels in sorted(modules.values(), key=_work, reverse=True):
        min(shares, key=_work).update(kernels)
    return [share for share in shares if share]


def _work(kernels: Mapping[str, Sequence[str]]) -> int:
    """About how long kernels take: what comes before the targets is as much as two of them."""
    return sum(2 + len(targets) for targets in kernels.values())


def stays_in_registers(name: str, used: dict[str, Any]) -> bool:
    """Whether a kernel's code for one target has no memory of a thread's own, or no more than is known of it."""
    if name in SPILLS:
        return bool(used["spills"] <= SPILLS[name])
    return bool(used["STACK"] == used["LOCAL"] == used["spills"] == 0)
