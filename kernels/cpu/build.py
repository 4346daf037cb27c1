"""A compiling process: makes parts for an instruction set. Numba lives and ends with it (compilation.py starts it)."""

from __future__ import annotations

import gc
import sys
from importlib import import_module
from pathlib import Path

from svdengine.kernels.cpu import isa
from svdengine.kernels.cpu.kernel_files import write_kernels
from svdengine.kernels.cpu.parts import PARTS, symbol_of


def main(arguments: list[str]) -> None:
    """An instruction set, the folder to write to, and the names of parts."""
    target, folder, *names = arguments
    isa.compile_for(target)
    gc.disable()  # what Numba makes stays until the end: looking for garbage would be a tenth of the time
    from svdengine.kernels.cpu.codegen import compile_for, object_code  # after the instruction set is chosen

    compile_for(isa.triple_of(target), *isa.target_of(target))
    for name in names:
        import_module(f"svdengine.kernels.cpu.{PARTS[name].module}")
        from svdengine.kernels.cpu.pieces import ENTRIES

        code = object_code({symbol_of(piece): ENTRIES[piece] for piece in PARTS[name].pieces})
        write_kernels(Path(folder), name, code)


if __name__ == "__main__":
    main(sys.argv[1:])
