"""Compiles kernels to machine code for a GPU that is not there, by the path that is taken on one.

Run as a program it compiles every kernel, or those named, and prints what each uses as one line of JSON. It must not
run in the simulator.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from typing import Any

from cuda import pathfinder

from svdengine.kernels.cuda.catalogue import all_kernels
from svdengine.kernels.cuda.compilation import Capability, compile_kernel

CAPABILITIES: dict[str, Capability] = {"sm_80": (8, 0), "sm_90a": (9, 0, "a")}


def inspect_cubin(cubin: bytes) -> dict[str, int]:
    """Registers a thread (REG), bytes of stack, local and static shared memory, and counts of instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        used = _output("cuobjdump", "-res-usage", file.name)
        machine_code = _output("nvdisasm", "-c", file.name)
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", used)}
    for name, pattern in (("wide_loads", r"\bLDG\.E\.128"), ("spills", r"\b(?:LDL|STL)\b"), ("dp4a", r"\bIDP\.4A")):
        found[name] = len(re.findall(pattern, machine_code))
    return found


def _output(tool: str, *arguments: str) -> str:
    program = pathfinder.find_nvidia_binary_utility(tool)
    if program is None:
        raise FileNotFoundError(f"{tool} is not installed")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def main(names: list[str]) -> None:
    """Compile and inspect, and print {kernel: {architecture: figures}}, or {kernel: {"error": text}}."""
    report: dict[str, dict[str, Any]] = {}
    for name, kernel in all_kernels().items():
        if names and name not in names:
            continue
        try:
            _, cubins = compile_kernel(kernel, list(CAPABILITIES.values()))
            report[name] = dict(zip(CAPABILITIES, map(inspect_cubin, cubins), strict=True))
        except Exception as error:
            report[name] = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
