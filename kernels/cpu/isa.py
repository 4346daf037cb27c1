"""Which instruction set the kernels are compiled for.

Vectors are 512 bits wide in the kernels' code; LLVM splits them where the hardware's are narrower. Only the integer dot
product and a few conversions differ between instruction sets. Kernels are compiled for an instruction set and not for
one CPU, so that what one machine compiles runs on others, of another architecture too.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from functools import cache

import llvmlite.binding as llvm

from svdengine.errors import DeviceError
from svdengine.kernels.cpu.arm_features import arm_features

AMX = "amx"  # AVX-512, and integer products of tiles
AVX512 = "avx512"  # AVX-512 with VNNI: 512-bit vpdpbusd
AVXVNNI = "avxvnni"  # AVX2 with 256-bit vpdpbusd
AVX2 = "avx2"  # AVX2, FMA and F16C
I8MM = "i8mm"  # Arm with products of int8 matrices: smmla, and sdot besides
NEON = "neon"  # Arm with the dot-product extension: sdot
PORTABLE = "portable"  # whatever LLVM makes of plain vector code

ENVIRONMENT = "SVDENGINE_ISA"  # forces one, for tests and comparisons


_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # Linux, x86-64: arch_prctl(2), ARCH_REQ_XCOMP_PERM
_MACHINE = platform.machine().lower()
_X86 = _MACHINE in ("x86_64", "amd64")
_ARM = _MACHINE in ("aarch64", "arm64")
# What LLVM compiles for: a CPU, and what it has besides. Each has what `supported_isas` asks for, and no more: Arm's
# have the dot product since version 8.2, of which atomics (lse) are a part.
_TARGETS = {
    AMX: ("x86-64-v4", "+avx512vnni,+amx-tile,+amx-int8"),
    AVX512: ("x86-64-v4", "+avx512vnni"),
    AVXVNNI: ("x86-64-v3", "+avxvnni"),
    AVX2: ("x86-64-v3", ""),
    I8MM: ("generic", "+neon,+lse,+dotprod,+i8mm"),
    NEON: ("generic", "+neon,+lse,+dotprod"),
    PORTABLE: ("x86-64-v2" if _X86 else "generic", ""),
}
ISAS = tuple(_TARGETS)
ARM_ISAS = (I8MM, NEON)
_compiled_for: str | None = None  # in a process that compiles for another machine


@cache
def host_features() -> frozenset[str]:
    """Names of the features that LLVM sees in this CPU, and on Arm those that the system names."""
    try:
        found = {name for name, present in llvm.get_host_cpu_features().items() if present}
    except RuntimeError:  # LLVM cannot tell on every system
        found = set()
    return frozenset(found | arm_features() if _ARM else found)


@cache
def tiles_allowed() -> bool:
    """Ask the system for AMX's tile registers, which Linux (5.16 and later) gives a process that asks for them."""
    if sys.platform != "linux":
        return False
    try:
        syscall = ctypes.CDLL(None, use_errno=True).syscall
    except (OSError, AttributeError):
        return False
    return bool(syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0)


def supported_isas() -> tuple[str, ...]:
    """What this CPU can run, best first."""
    features = host_features()
    avx2 = {"avx2", "fma", "f16c"} <= features
    avx512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni"} <= features
    found = {
        AMX: avx512 and {"amx-tile", "amx-int8"} <= features and tiles_allowed(),
        AVX512: avx512,
        AVXVNNI: avx2 and "avxvnni" in features,
        AVX2: avx2,
        I8MM: _ARM and {"dotprod", "i8mm"} <= features,
        NEON: _ARM and "dotprod" in features,
        PORTABLE: True,
    }
    return tuple(isa for isa, present in found.items() if present)


def weight_bias(isa: str) -> int:
    """What int8 weights are offset by for its integer dot product, which may want one side unsigned (dot.py)."""
    return 128 if isa in (AMX, AVX512, AVXVNNI) else 0


def wide(isa: str) -> bool:
    """Whether it has the 32 registers of 512 bits of AVX-512."""
    return isa in (AMX, AVX512)


@cache
def active_isa() -> str:
    """The instruction set in use. Raises DeviceError when the environment asks for one that this CPU lacks."""
    if _compiled_for is not None:
        return _compiled_for
    supported = supported_isas()
    wanted = os.environ.get(ENVIRONMENT)
    if not wanted:
        return supported[0]
    if wanted not in supported:
        raise DeviceError(f"{ENVIRONMENT}={wanted}: this CPU has {', '.join(supported)}")
    return wanted


def compile_for(isa: str) -> None:
    """Let kernels that are imported later be for this instruction set, whatever this CPU has: they cannot run here."""
    global _compiled_for
    _compiled_for = isa
    active_isa.cache_clear()


def target_of(isa: str) -> tuple[str, str]:
    """What LLVM is to compile for: the name of a CPU, and features that it has besides."""
    return _TARGETS[isa]


def is_arm(isa: str) -> bool:
    """Whether an instruction set is one of Arm's: a portable one is that of this machine."""
    return isa in ARM_ISAS or (isa == PORTABLE and _ARM)


def triple_of(isa: str) -> str:
    """LLVM's name of the machines that have an instruction set: this machine's, or its system on the other one."""
    here = llvm.get_process_triple()
    if isa == PORTABLE or is_arm(isa) == _ARM:
        return here
    return "-".join(["aarch64" if is_arm(isa) else "x86_64", *here.split("-")[1:]])


def compilable_isas() -> tuple[str, ...]:
    """What this machine's compiler has kernels for, best first: those of x86-64 and of Arm, whatever this one is."""
    return ISAS if _X86 or _ARM else (PORTABLE,)
