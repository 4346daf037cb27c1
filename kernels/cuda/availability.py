"""Whether a GPU can be used, and what it is; one line on what is missing where it cannot."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from dataclasses import dataclass
from typing import Any

LEAST_CAPABILITY = (8, 0)
NO_DRIVER = "no NVIDIA driver was found"
_ADVICE = 'pip install "svdengine[cuda]"'


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver describes it."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]


def find_gpu(index: int = 0) -> Gpu | str:
    """The GPU, or one line on why none can be used. Nothing heavy is imported before a driver is found."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return NO_DRIVER
    for package, name in (("cupy", "CuPy"), ("numba_cuda", "numba-cuda")):
        if importlib.util.find_spec(package) is None:
            return f"a driver was found, but {name} is missing; {_ADVICE}"
    try:
        import cupy

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
