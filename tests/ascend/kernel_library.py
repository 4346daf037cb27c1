"""The AscendC kernels as the emulated NPU launches them: the real sources, compiled for the host."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fake_memory import BrokenRule, Memory

from svdengine.kernels.ascend import signatures

Launch = Callable[..., None]


class KernelLibrary:
    """A library made from kernel_library.cpp."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.shim_add_region.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
        self._library.shim_error.restype = ctypes.c_char_p

    def launches(self) -> dict[str, Launch]:
        """For Npu.launches: run(memory, blocks, arguments...) of each kernel."""
        return {symbol: self._launch(symbol) for symbol in signatures.LAUNCHES}

    def _launch(self, symbol: str) -> Launch:
        function = getattr(self._library, symbol)
        function.restype, function.argtypes = signatures.LAUNCHES[symbol]
        addresses = [kind is ctypes.c_void_p for kind in function.argtypes[2:]]

        def launch(memory: Memory, blocks: int, *arguments: Any) -> None:
            given = [value for address, value in zip(addresses, arguments, strict=True) if address and value]
            regions = {data.ctypes.data: data.nbytes for data in map(memory.allocation_of, given)}
            for region in regions.items():
                self._library.shim_add_region(*region)
            if function(blocks, None, *arguments):
                raise BrokenRule(f"{symbol}: {self._library.shim_error().decode()}")

        return launch
