"""Machine code for every target, made without a GPU: kernels must be able to start, and do no work that is slow there.

`pytest -m long` looks at all kernels; otherwise it is those that are nearest to a limit.
"""

from __future__ import annotations

from typing import Any

import pytest
from compiled import FLOAT32, NEAR_A_LIMIT, SPILLS, THREADS, compile_all, stays_in_registers
from test_compile import most_registers

from svdengine.commands.compile import CUDA_TARGETS
from svdengine.kernels.cuda.catalogue import all_kernels
from svdengine.kernels.cuda.compilation import TARGETS


@pytest.mark.slow
def test_blocks_of_1024_threads_can_start_on_every_target(machine_code_report: Any) -> None:
    found = {name: machine_code_report[name] for name in NEAR_A_LIMIT}
    for name in SPILLS:
        assert any(used["spills"] for used in found[name].values()), f"{name} fits now: take it out of the list"
    for name, targets in found.items():
        assert targets.keys() == TARGETS.keys()
        for target, used in targets.items():
            assert used["REG"] * THREADS.get(name, 256) <= 65536, f"{name} {target}: {used['REG']} registers"
            assert stays_in_registers(name, used), f"{name} {target}: {used}"
            if name in FLOAT32:  # a few operations on float64 a thread, and none a token
                double = {op: n for op, n in used["operations"].items() if op in ("DFMA", "DMUL", "DADD", "DSETP")}
                assert "DFMA" not in double and sum(double.values()) <= 8, f"{name} {target}: {double}"


def test_kernels_that_need_it_say_how_large_their_blocks_are() -> None:
    kernels = all_kernels()
    if hasattr(kernels["list_every"].dispatcher, "targetoptions"):  # the simulator drops options
        for name, threads in THREADS.items():
            assert kernels[name].dispatcher.targetoptions["launch_bounds"] == threads


@pytest.mark.long
def test_every_kernel_stays_in_registers_on_every_target() -> None:
    for name, targets in compile_all(dict.fromkeys(all_kernels(), tuple(TARGETS))).items():
        for target, used in targets.items():
            assert stays_in_registers(name, used), f"{name} {target}: {used}"
            assert used["REG"] <= most_registers(name), f"{name} {target}: {used['REG']} registers"


def test_the_command_knows_every_target() -> None:
    assert tuple(TARGETS) == CUDA_TARGETS
