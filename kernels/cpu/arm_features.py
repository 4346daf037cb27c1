"""What an Arm CPU has, as the operating system says it. LLVM knows a part of it, in some of its versions."""

from __future__ import annotations

import ctypes
import sys

# Linux: bits of the auxiliary vector, "HWCAP" in the kernel's documentation of arm64. A wrong name in /proc/cpuinfo, as
# under emulation or in some containers, changes nothing here.
_HWCAP, _HWCAP2 = 16, 26
_LINUX = {"neon": (_HWCAP, 1), "lse": (_HWCAP, 8), "dotprod": (_HWCAP, 20), "sve": (_HWCAP, 22)}
_LINUX |= {"i8mm": (_HWCAP2, 13), "bf16": (_HWCAP2, 14)}
# macOS: what sysctl knows them by.
_MACOS = {"neon": "AdvSIMD", "lse": "arm.FEAT_LSE", "dotprod": "arm.FEAT_DotProd"}
_MACOS |= {"i8mm": "arm.FEAT_I8MM", "bf16": "arm.FEAT_BF16"}


def arm_features() -> frozenset[str]:
    """LLVM's names of features that this Arm CPU has, among those that the project knows; none where no one says."""
    try:
        if sys.platform == "linux":
            return _from_auxiliary_vector(ctypes.CDLL(None))
        if sys.platform == "darwin":
            return _from_sysctl(ctypes.CDLL(None))
    except (OSError, AttributeError):  # a C library without these calls
        pass
    return frozenset()


def _from_auxiliary_vector(library: ctypes.CDLL) -> frozenset[str]:
    library.getauxval.restype, library.getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    words = {kind: int(library.getauxval(kind)) for kind in (_HWCAP, _HWCAP2)}
    return frozenset(name for name, (kind, bit) in _LINUX.items() if words[kind] >> bit & 1)


def _from_sysctl(library: ctypes.CDLL) -> frozenset[str]:
    def has(name: str) -> bool:
        value, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
        asked = f"hw.optional.{name}".encode()
        code = library.sysctlbyname(asked, ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
        return code == 0 and value.value == 1

    return frozenset(name for name, asked in _MACOS.items() if has(asked))
