"""Which instruction set the kernels are compiled for.

Vectors are 512 bits wide in the kernels' code; LLVM splits them where the hardware's are narrower. Only the integer dot
product and a few conversions differ between instruction sets. An intrinsic that the CPU lacks aborts the process when
LLVM meets it, so the choice is made from the CPU's own features.
"""

from __future__ import annotations

import os
import platform
from functools import cache

import llvmlite.binding as llvm

from svdengine.errors import DeviceError

AVX512 = "avx512"  # AVX-512 with VNNI: 512-bit vpdpbusd
AVXVNNI = "avxvnni"  # AVX2 with 256-bit vpdpbusd
AVX2 = "avx2"  # AVX2, FMA and F16C
NEON = "neon"  # Arm with the dot-product extension
PORTABLE = "portable"  # whatever LLVM makes of plain vector code

ENVIRONMENT = "SVDENGINE_ISA"  # forces one, for tests and comparisons


@cache
def host_features() -> frozenset[str]:
    """Names of the features that LLVM sees in this CPU."""
    return frozenset(name for name, present in llvm.get_host_cpu_features().items() if present)


def supported_isas() -> tuple[str, ...]:
    """What this CPU can run, best first."""
    features = host_features()
    arm = platform.machine().lower() in ("aarch64", "arm64")
    avx2 = {"avx2", "fma", "f16c"} <= features
    found = {
        AVX512: {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni"} <= features,
        AVXVNNI: avx2 and ("avxvnni" in features or {"avx512vl", "avx512vnni"} <= features),
        AVX2: avx2,
        NEON: arm and "dotprod" in features,
        PORTABLE: True,
    }
    return tuple(isa for isa, present in found.items() if present)


@cache
def active_isa() -> str:
    """The instruction set in use. Raises DeviceError when the environment asks for one that this CPU lacks."""
    supported = supported_isas()
    wanted = os.environ.get(ENVIRONMENT)
    if not wanted:
        return supported[0]
    if wanted not in supported:
        raise DeviceError(f"{ENVIRONMENT}={wanted}: this CPU has {', '.join(supported)}")
    return wanted
