"""Compiled kernels in memory: object code, linked by LLVM without Numba, and what Python calls in it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite.binding as llvm

from svdengine.errors import DeviceError
from svdengine.kernels.cpu.compilation import object_code
from svdengine.kernels.cpu.isa import active_isa, is_arm
from svdengine.kernels.cpu.parts import PARTS, symbol_of


class Library:
    """Parts of compiled code. A function is called with integers, without the GIL; it lives as long as the library."""

    def __init__(self, parts: frozenset[str]) -> None:
        builder = llvm.JITLibraryBuilder()
        for code in object_code(sorted(parts), active_isa()):
            builder.add_object_img(code)
        builder.add_current_process()
        self._addresses: dict[str, int] = {}
        for name, part in PARTS.items():
            for piece in part.pieces:
                if name in parts:
                    builder.export_symbol(symbol_of(piece))
                else:
                    builder.import_symbol(symbol_of(piece), _abort())
        try:
            self._linked = builder.link(_linker(), f"svdengine-{'-'.join(sorted(parts))}")
        except RuntimeError as error:
            raise DeviceError(f"the compiled kernels cannot be linked: {error}") from error

    def function(self, piece: str, arguments: int) -> Callable[..., int]:
        """What to call: it takes so many integers and gives one."""
        word = ctypes.c_int64
        prototype: Any = ctypes.CFUNCTYPE(word, *[word] * arguments)
        return prototype(self._linked[symbol_of(piece)])


@cache
def loaded(parts: frozenset[str]) -> Library:
    """The library of these parts, compiled first where no one has. Raises DeviceError where they cannot be."""
    return Library(parts)


@cache
def _linker() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    if os.name == "nt":
        llvm.load_library_permanently("kernel32.dll")  # Sleep, of sync.py
    machine = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine()
    # LLVM's older linker puts each section anywhere, and Arm's code reaches its constants within 4 GiB only: whether it
    # worked would be luck. For Windows there is only that one.
    return llvm.create_lljit_compiler(machine, use_jit_link=is_arm(active_isa()) and os.name != "nt")


@cache
def _abort() -> int:
    """What stands for pieces that the model does not need: should one be called, the process ends there."""
    library: Any = ctypes.CDLL("msvcrt" if os.name == "nt" else None)
    return ctypes.cast(library.abort, ctypes.c_void_p).value or 0
