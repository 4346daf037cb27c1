"""Compiles kernels to machine code for a GPU that is not there, by the path that numba-cuda takes on one.

Run as a program it compiles every kernel, or those named, and prints what each uses as one line of JSON. It must not
run in the simulator. Names that are private to numba-cuda are those of the version that pyproject.toml pins.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from cuda import pathfinder
from numba.cuda import dispatcher
from numba.cuda.codegen import CUDACodeLibrary
from numba.cuda.core import sigutils

from svdengine.kernels.cuda.catalogue import all_kernels
from svdengine.kernels.cuda.intrinsics import Kernel

Capability = tuple[Any, ...]
CAPABILITIES: dict[str, Capability] = {"sm_80": (8, 0), "sm_90a": (9, 0, "a")}


@contextlib.contextmanager
def pretended(capability: Capability) -> Iterator[None]:
    """Let numba-cuda believe that there is a GPU of this compute capability."""
    before = dispatcher.get_current_device, CUDACodeLibrary._ensure_cc
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability[:2])
    CUDACodeLibrary._ensure_cc = lambda self, cc: capability if cc is None else cc
    try:
        yield
    finally:
        dispatcher.get_current_device, CUDACodeLibrary._ensure_cc = before


def compile_kernel(kernel: Kernel) -> dict[str, bytes]:
    """The kernel's cubin for each architecture, linked as on a GPU. What comes before NVVM is the same for all."""
    signature = sigutils.normalize_signature(kernel.signature())[0]
    with pretended((8, 0)):
        compiled = dispatcher._Kernel(kernel.dispatcher.py_func, signature, **kernel.dispatcher.targetoptions)
    cubins = {}
    for architecture, capability in CAPABILITIES.items():
        with pretended(capability):
            cubins[architecture] = bytes(compiled._codelibrary.get_cubin(cc=capability).code)
    return cubins


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
            report[name] = {
                architecture: inspect_cubin(cubin) for architecture, cubin in compile_kernel(kernel).items()
            }
        except Exception as error:
            report[name] = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
