"""Compiles kernels to machine code for a GPU that is not there, by the path that is taken on one.

Run as a program it compiles the kernels that it is given, or {kernel: [target, ...]} from standard input, and prints
what each uses as one line of JSON. It must not run in the simulator.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections import Counter
from typing import Any

import machine_code
from disassembly import disassembled, output

from svdengine.kernels.cuda.catalogue import all_kernels
from svdengine.kernels.cuda.compilation import TARGETS, compile_kernel


def figures(cubin: bytes, text: str) -> dict[str, Any]:
    """Registers a thread (REG), bytes of stack, local and static shared memory, counts of instructions, and loops.

    text: the cubin's instructions.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        used = output("cuobjdump", "-res-usage", file.name)
    found: dict[str, Any] = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", used)}
    operations = [instruction.name for instruction in machine_code.parse(text)[0]]
    found["operations"] = Counter(name.split(".")[0] for name in operations)
    found["wide_loads"] = sum(name.startswith("LDG.E.") and "128" in name.split(".") for name in operations)
    found["spills"] = found["operations"]["LDL"] + found["operations"]["STL"]
    found["before_wait"] = machine_code.memory_before_wait(text)
    found["loops"] = [machine_code.summary(loop) for loop in machine_code.inner_loops(text)]
    return found


def main() -> None:
    """Compile and inspect, and print {kernel: {target: figures}}, or {kernel: {"error": text}}."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--for", dest="targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("names", nargs="*")
    asked = parser.parse_args()
    wanted: dict[str, list[str]] = dict.fromkeys(asked.names, asked.targets) if asked.names else json.load(sys.stdin)
    kernels = all_kernels()
    report: dict[str, dict[str, Any]] = {}
    made: dict[str, dict[str, bytes]] = {target: {} for target in TARGETS}  # target -> kernel -> cubin
    for name, targets in wanted.items():
        try:
            _, cubins = compile_kernel(kernels[name], [TARGETS[target] for target in targets])
        except Exception as error:
            report[name] = {"error": f"{type(error).__name__}: {error}"}
            continue
        report[name] = {}
        for target, cubin in zip(targets, cubins, strict=True):
            made[target][name] = cubin
    for target, of_kernel in made.items():
        texts = disassembled(list(of_kernel.values()), target)
        for (name, cubin), text in zip(of_kernel.items(), texts, strict=True):
            report[name][target] = figures(cubin, text)
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)  # to take apart what the compiler leaves can take minutes
