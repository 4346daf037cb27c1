"""Compiling kernels with Numba for a compute capability, and keeping the machine code on disk.

The driver is not asked: the same code compiles for a GPU that is not there. Names that are private to numba-cuda are
those of the version that pyproject.toml pins.

Machine code is looked for in what was brought along (kernels/brought_along.py), and then in the user's cache, in a
folder for exactly these sources, this compiler, and the CUDA generation of its tools: a driver for CUDA 12 does not
take what those of CUDA 13 made.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any

from svdengine.kernels import batch, formats
from svdengine.kernels.brought_along import folders_brought_along
from svdengine.kernels.cores import default_threads
from svdengine.kernels.cuda.intrinsics import Kernel
from svdengine.kernels.user_cache import user_cache_directory

Capability = tuple[Any, ...]  # (8, 0), or (9, 0, "a") with what only that architecture has
MachineCode = tuple[str, bytes]  # the name of a kernel's entry, and its cubin

# What kernels are tested for: A100, RTX 30, Jetson Orin, RTX 40 and L4, H100 and H200, B200, RTX 50.
TARGETS: dict[str, Capability] = {
    "sm_80": (8, 0),
    "sm_86": (8, 6),
    "sm_87": (8, 7),
    "sm_89": (8, 9),
    "sm_90a": (9, 0, "a"),
    "sm_100a": (10, 0, "a"),
    "sm_120a": (12, 0, "a"),
}
_HEADER = b"svdengine cuda kernel 1\n"
_MOST_THREADS = 16
EARLY_CAPABILITY = (9, 0)  # from which a kernel may start before the one before it has ended
# What follows may start as soon as nothing of this kernel is left to start, but never two kernels ahead.
_WAIT = '  call void asm sideeffect "griddepcontrol.wait; griddepcontrol.launch_dependents;", "~{memory}"()\n'
_front = Lock()  # Numba's own part is patched while it runs, and takes one kernel at a time anyway


def target_of(major: int, minor: int) -> Capability:
    """What to compile for on a GPU of this compute capability."""
    return (major, minor, "a") if (major, minor) >= (9, 0) else (major, minor)


def machine_code(kernel: Kernel, capability: Capability) -> MachineCode:
    """A kernel's machine code, from the disk or compiled now and kept there."""
    return machine_codes([kernel], capability)[kernel.name]


def machine_codes(kernels: Iterable[Kernel], capability: Capability) -> dict[str, MachineCode]:
    """The machine code of kernels by name. What is not on the disk is compiled in threads, which is said, and kept."""
    found: dict[str, MachineCode] = {}
    missing: list[Kernel] = []
    for kernel in kernels:
        code = _read(kernel.name, capability)
        if code is None:
            missing.append(kernel)
        else:
            found[kernel.name] = code
    if missing:
        what = "1 CUDA kernel" if len(missing) == 1 else f"{len(missing)} CUDA kernels"
        print(f"compiling {what} for {architecture(capability)}, once on this machine ...", file=sys.stderr, flush=True)
        found |= compile_into(user_folder(), missing, capability)
    return found


def compile_into(
    folder: Path, kernels: Sequence[Kernel], *capabilities: Capability, must_keep: bool = False
) -> dict[str, MachineCode]:
    """Compile kernels in threads and keep them in a folder; returns those for the first of the capabilities.

    Raises OSError where they cannot be kept and `must_keep`.
    """

    def one(kernel: Kernel) -> tuple[str, MachineCode]:
        entry, cubins = compile_kernel(kernel, capabilities)
        # Without a cache it is compiled again next time.
        with contextlib.nullcontext() if must_keep else contextlib.suppress(OSError):
            for capability, cubin in zip(capabilities, cubins, strict=True):
                _write(folder / _file_name(kernel.name, capability), entry, cubin)
        return kernel.name, (entry, cubins[0])

    with ThreadPoolExecutor(max(1, min(_MOST_THREADS, default_threads(), len(kernels)))) as pool:
        return dict(pool.map(one, kernels))


def compile_kernel(kernel: Kernel, capabilities: Sequence[Capability]) -> tuple[str, list[bytes]]:
    """The name of a kernel's entry, and its cubin for each compute capability. What comes before NVVM is the same.

    Threads may call it: the last step, which takes about half of the time, then runs side by side.
    """
    from numba.cuda import dispatcher
    from numba.cuda.core import sigutils

    with _front, _pretended(capabilities[0]):
        arguments = sigutils.normalize_signature(kernel.signature())[0]
        compiled = dispatcher._Kernel(kernel.dispatcher.py_func, arguments, **kernel.dispatcher.targetoptions)
    library, cubins = compiled._codelibrary, []
    plain = library.llvm_strs
    for capability in capabilities:
        early = capability >= EARLY_CAPABILITY
        library._llvm_strs = [_with_wait(text, compiled.entry_name) for text in plain] if early else plain
        cubins.append(bytes(library.get_cubin(cc=capability).code))
    return compiled.entry_name, cubins


def _with_wait(code: str, entry: str) -> str:
    """LLVM's code of a kernel that waits at its beginning for what was launched before it.

    So it may be launched before that is done (kernels/cuda/early_launch.py). Launched as usual it waits for nothing.
    """
    begin = code.find(f'define void @"{entry}"(')
    if begin < 0:  # a module of device functions
        return code
    first = code.index("entry:\n", begin) + len("entry:\n")
    return f"{code[:first]}{_WAIT}{code[first:]}"


def read_machine_code(folder: Path, name: str, capability: Capability) -> MachineCode | None:
    """A kernel's machine code in a folder; None where there is none, or it is damaged."""
    try:
        data = (folder / _file_name(name, capability)).read_bytes()
    except OSError:
        return None
    start = len(_HEADER) + hashlib.sha256().digest_size
    entry, _, cubin = (code := data[start:]).partition(b"\0")
    return (entry.decode(), cubin) if data[:start] == _HEADER + hashlib.sha256(code).digest() else None


@cache
def folder_name() -> str:
    """The folder of machine code of exactly these sources, this compiler and CUDA's generation."""
    tools = f"{version('numba-cuda')} {version('cuda-bindings').split('.')[0]}"
    digest = hashlib.sha256(_HEADER + tools.encode())
    for source in (*sorted(Path(__file__).parent.rglob("*.py")), Path(batch.__file__), Path(formats.__file__)):
        digest.update(source.read_bytes())
    return f"cuda-{digest.hexdigest()[:16]}"


def user_folder() -> Path:
    """The folder in the user's cache."""
    return user_cache_directory() / "kernels" / folder_name()


def architecture(capability: Capability) -> str:
    """sm_80, or sm_90a."""
    return "sm_" + "".join(map(str, capability))


def _read(name: str, capability: Capability) -> MachineCode | None:
    for folder in (*(root / folder_name() for root in folders_brought_along()), user_folder()):
        if (code := read_machine_code(folder, name, capability)) is not None:
            return code
    return None


def _write(path: Path, entry: str, cubin: bytes) -> None:
    code = entry.encode() + b"\0" + cubin
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(_HEADER + hashlib.sha256(code).digest() + code)
    temporary.replace(path)


def _file_name(name: str, capability: Capability) -> str:
    return f"{name}-{architecture(capability)}.cubin"


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
