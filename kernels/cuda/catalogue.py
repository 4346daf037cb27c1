"""Every kernel of this folder: what a test compiles for each architecture without a GPU.

A kernel is found as an attribute of its module, alone or in a dictionary. A module that makes kernels on demand says in
a function `every_kernel()` which there are.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

from svdengine.kernels import cuda as package
from svdengine.kernels.cuda.intrinsics import Kernel


def all_kernels() -> dict[str, Kernel]:
    """Name -> kernel. Raises ValueError when two have the same name."""
    kernels: dict[str, Kernel] = {}
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(info.name)
        for kernel in _kernels_of(vars(module)):
            if kernels.setdefault(kernel.name, kernel) is not kernel:
                raise ValueError(f"two kernels are called {kernel.name}")
    return kernels


def _kernels_of(names: dict[str, Any]) -> Iterator[Kernel]:
    values = [*names.values(), *(names["every_kernel"]() if "every_kernel" in names else ())]
    for value in values:
        yield from (k for k in (value.values() if isinstance(value, dict) else (value,)) if isinstance(k, Kernel))
