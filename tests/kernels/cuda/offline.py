"""Compiles kernels to machine code for a GPU that is not there, by the path that is taken on one.

Run as a program it compiles every kernel, or those named, and prints what each uses as one line of JSON. It must not
run in the simulator.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from typing import Any

import machine_code
from cuda import pathfinder

from svdengine.kernels.cuda.catalogue import all_kernels
from svdengine.kernels.cuda.compilation import Capability, compile_kernel

# A100, RTX 30, RTX 40, H100 and H200, B200, RTX 50.
CAPABILITIES: dict[str, Capability] = {
    "sm_80": (8, 0),
    "sm_86": (8, 6),
    "sm_89": (8, 9),
    "sm_90a": (9, 0, "a"),
    "sm_100a": (10, 0, "a"),
    "sm_120a": (12, 0, "a"),
}


def inspect_cubin(cubin: bytes) -> dict[str, Any]:
    """Registers a thread (REG), bytes of stack, local and static shared memory, counts of instructions, and loops."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        used = _output("cuobjdump", "-res-usage", file.name)
        text = _output("nvdisasm", "-c", file.name)
    found: dict[str, Any] = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", used)}
    for name, pattern in (("wide_loads", r"\bLDG\.E\.(?:\w+\.)*128"), ("spills", r"\b(?:LDL|STL)\b")):
        found[name] = len(re.findall(pattern, text))
    found["before_wait"] = machine_code.memory_before_wait(text)
    found["loops"] = [machine_code.summary(loop) for loop in machine_code.inner_loops(text)]
    return found


def _output(tool: str, *arguments: str) -> str:
    program = pathfinder.find_nvidia_binary_utility(tool)
    if program is None:
        raise FileNotFoundError(f"{tool} is not installed")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Compile and inspect, and print {kernel: {architecture: figures}}, or {kernel: {"error": text}}."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--for", dest="targets", nargs="+", choices=CAPABILITIES, default=list(CAPABILITIES))
    parser.add_argument("names", nargs="*")
    asked = parser.parse_args()
    report: dict[str, dict[str, Any]] = {}
    for name, kernel in all_kernels().items():
        if asked.names and name not in asked.names:
            continue
        try:
            _, cubins = compile_kernel(kernel, [CAPABILITIES[target] for target in asked.targets])
            report[name] = dict(zip(asked.targets, map(inspect_cubin, cubins), strict=True))
        except Exception as error:
            report[name] = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
