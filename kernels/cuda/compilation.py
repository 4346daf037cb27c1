"""Compiling kernels with Numba for a compute capability, and keeping the machine code on disk.

The driver is not asked: the same code compiles for a GPU that is not there. Names that are private to numba-cuda are
those of the version that pyproject.toml pins.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from svdengine.kernels import batch, formats
from svdengine.kernels.cuda.intrinsics import Kernel
from svdengine.kernels.user_cache import user_cache_directory

Capability = tuple[Any, ...]  # (8, 0), or (9, 0, "a") with what only that architecture has


def target_of(major: int, minor: int) -> Capability:
    """What to compile for on a GPU of this compute capability."""
    return (major, minor, "a") if (major, minor) >= (9, 0) else (major, minor)


def machine_code(kernel: Kernel, capability: Capability) -> tuple[str, bytes]:
    """The name of a kernel's entry and its cubin, from the disk or compiled now and kept there."""
    architecture = "".join(map(str, capability))
    path = _cache_directory() / f"{kernel.name}-sm_{architecture}.cubin"
    with contextlib.suppress(OSError):
        name, _, cubin = path.read_bytes().partition(b"\0")
        if name and cubin:
            return name.decode(), cubin
    entry, (cubin,) = compile_kernel(kernel, [capability])
    with contextlib.suppress(OSError):  # without a cache it is compiled again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(entry.encode() + b"\0" + cubin)
        temporary.replace(path)
    return entry, cubin


def compile_kernel(kernel: Kernel, capabilities: Sequence[Capability]) -> tuple[str, list[bytes]]:
    """The name of a kernel's entry, and its cubin for each compute capability. What comes before NVVM is the same."""
    from numba.cuda import dispatcher
    from numba.cuda.core import sigutils

    arguments = sigutils.normalize_signature(kernel.signature())[0]
    with _pretended(capabilities[0]):
        compiled = dispatcher._Kernel(kernel.dispatcher.py_func, arguments, **kernel.dispatcher.targetoptions)
    cubins = []
    for capability in capabilities:
        with _pretended(capability):
            cubins.append(bytes(compiled._codelibrary.get_cubin(cc=capability).code))
    return compiled.entry_name, cubins


@contextlib.contextmanager
def _pretended(capability: Capability) -> Iterator[None]:
    """Let numba-cuda believe that there is a GPU of this compute capability."""
    from numba.cuda import dispatcher
    from numba.cuda.codegen import CUDACodeLibrary

    before = dispatcher.get_current_device, CUDACodeLibrary._ensure_cc
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability[:2])
    CUDACodeLibrary._ensure_cc = lambda self, cc: capability if cc is None else cc
    try:
        yield
    finally:
        dispatcher.get_current_device, CUDACodeLibrary._ensure_cc = before


@cache
def _cache_directory() -> Path:
    """Machine code of exactly these sources and this compiler."""
    digest = hashlib.sha256(version("numba-cuda").encode())
    for source in (*sorted(Path(__file__).parent.rglob("*.py")), Path(batch.__file__), Path(formats.__file__)):
        digest.update(source.read_bytes())
    return user_cache_directory() / "kernels" / f"cuda-{digest.hexdigest()[:16]}"
