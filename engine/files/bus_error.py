"""A last word where a mapped page is gone in the middle of a step: the system ends the process then, by SIGBUS.

Python runs no handler while compiled code does, and nothing can be mended: the page is not there. So a few instructions
of machine code write one line that names the mapped files to standard error, and leave the signal to its fate. They
call only write and signal, which POSIX allows in a handler. A program that has its own handler, such as faulthandler's,
keeps it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

_ROOM = 4096  # bytes of the line
_BEFORE = "svdengine: a page of a mapped file is gone (SIGBUS): it was truncated in use, or its disk failed. Mapped: "

# Two pointers are put in: to the line, and to its length.
_CODE = """
declare i64 @write(i32, i8*, i64)
declare i8* @signal(i32, i8*)
define void @tell(i32 %number) {{
  %text = inttoptr i64 {text} to i8*
  %cell = inttoptr i64 {length} to i64*
  %length = load i64, i64* %cell
  %written = call i64 @write(i32 2, i8* %text, i64 %length)
  %default = inttoptr i64 0 to i8*
  %before = call i8* @signal(i32 %number, i8* %default)
  ret void
}}
"""

_text = ctypes.create_string_buffer(_ROOM)
_length = ctypes.c_int64(0)
_mapped: list[Path] = []
_changing = threading.Lock()


def add_mapped(path: Path) -> None:
    """Name a file in the line, from now on."""
    with _changing:
        _mapped.append(path)
        _write_line()
    with suppress(Exception):  # it is a courtesy
        _install()


def remove_mapped(path: Path) -> None:
    """Name it no longer."""
    with _changing, suppress(ValueError):
        _mapped.remove(path)
        _write_line()


def _write_line() -> None:
    names = ", ".join(dict.fromkeys(map(str, _mapped)))
    line = (_BEFORE + names).encode("utf-8", "replace")[: _ROOM - 1] + b"\n"
    _length.value = 0  # the signal may come at any time
    ctypes.memmove(_text, line, len(line))
    _length.value = len(line) if _mapped else 0


@cache
def _install() -> Any:
    """Install the handler once, where the system has the signal and nobody else handles it; what keeps it in memory."""
    number = getattr(signal, "SIGBUS", None)
    if number is None or os.name != "posix" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return None
    library = ctypes.CDLL(None)
    before = (ctypes.c_uint64 * 64)()  # a struct sigaction, of which the handler comes first
    if library.sigaction(int(number), None, before) or before[0] != 0:
        return None
    from llvmlite import binding

    code = _CODE.format(text=ctypes.addressof(_text), length=ctypes.addressof(_length))
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine()
    compiled = binding.create_mcjit_compiler(binding.parse_assembly(code), machine)
    compiled.finalize_object()
    library.signal.argtypes, library.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    library.signal(int(number), compiled.get_function_address("tell"))
    return compiled
