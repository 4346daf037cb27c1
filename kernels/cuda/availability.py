"""Whether a GPU can be used, and what it is; one line on what is missing where it cannot."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LEAST_CAPABILITY = (8, 0)
NO_DRIVER = "no NVIDIA driver was found"
# The extras by the generation of CUDA that they bring. A driver of a generation takes all of its versions, so its first
# one is enough (NVIDIA's "CUDA compatibility", minor versions); the number is that of the Linux driver.
EXTRAS = {13: ("cuda", 580), 12: ("cuda12", 525)}
_ADVICE = 'pip install "svdengine[{}]"'
_VERSION_FILE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver describes it."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Driver:
    """An NVIDIA driver: the newest CUDA that it accepts, 12040 for 12.4, and its own version, where that is known."""

    cuda: int
    version: str = ""

    @property
    def generation(self) -> int:
        """12 for CUDA 12.4."""
        return self.cuda // 1000

    def __str__(self) -> str:
        accepted = f"accepts CUDA {self.cuda // 1000}.{self.cuda % 1000 // 10}"
        return f"the driver ({self.version}) {accepted}" if self.version else f"the driver {accepted}"


def find_gpu(index: int = 0) -> Gpu | str:
    """The GPU, or one line on why none can be used. Nothing heavy is imported before a driver is found."""
    driver = find_driver()
    if driver is None:
        return NO_DRIVER
    for package, name in (("cupy", "CuPy"), ("numba_cuda", "numba-cuda")):
        if importlib.util.find_spec(package) is None:
            extra = EXTRAS[12][0] if 0 < driver.cuda < 13000 else EXTRAS[13][0]
            return f"a driver was found, but {name} is missing; {_ADVICE.format(extra)}"
    try:
        import cupy

        if (reason := _too_old(driver, cupy.cuda.runtime.runtimeGetVersion())) is not None:
            return reason
        count = cupy.cuda.runtime.getDeviceCount()
        if index >= count:
            return "a driver was found, but no GPU"
        properties: dict[str, Any] = cupy.cuda.runtime.getDeviceProperties(index)
    except Exception as error:
        # Whatever a broken driver or installation raises: the CPU still works.
        return f"the GPU cannot be used: {' '.join(str(error).split())}"
    name, capability = properties["name"].decode(errors="replace"), (properties["major"], properties["minor"])
    if capability < LEAST_CAPABILITY:
        found, least = (".".join(map(str, c)) for c in (capability, LEAST_CAPABILITY))
        return f"{name} has compute capability {found}, and {least} is needed"
    return Gpu(name, int(properties["totalGlobalMem"]), capability)


def find_driver() -> Driver | None:
    """The NVIDIA driver of this machine; its CUDA is 0 where it does not tell."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    accepted = ctypes.c_int(0)
    try:
        library.cuDriverGetVersion(ctypes.byref(accepted))
    except AttributeError:
        return Driver(0)
    return Driver(accepted.value, _kernel_module_version())


def _kernel_module_version() -> str:
    """580.65.06, from what the kernel module says of itself; "" where that is not known."""
    try:
        found = re.search(r"\b\d{3,}\.\d+(?:\.\d+)*\b", _VERSION_FILE.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return ""
    return found.group() if found else ""


def _too_old(driver: Driver, runtime: int) -> str | None:
    """Why a driver does not take a CUDA runtime, 13000 for 13.0, and what to do; None where it does."""
    needed = runtime // 1000
    if driver.cuda == 0 or driver.generation >= needed:
        return None
    versions = [f"{driver}, and CUDA {needed} is installed here"]
    if needed in EXTRAS:
        versions.append(f"which needs a driver of version {EXTRAS[needed][1]} or newer: update it")
    if driver.generation in EXTRAS:
        extra = _ADVICE.format(EXTRAS[driver.generation][0])
        versions.append(f"or in a new environment {extra}")
    return ", ".join(versions)
