"""Memory for compiled code."""

from __future__ import annotations

import mmap
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

_LINE = 64  # bytes of a cache line


def aligned(size: int) -> NDArray[np.uint8]:
    """Zeroed bytes that start on a cache line."""
    room = np.zeros(size + _LINE, np.uint8)
    skip = -room.ctypes.data % _LINE
    return room[skip : skip + size]


def large(size: int) -> NDArray[np.uint8]:
    """Zeroed bytes that start on a page, in huge pages where the system has them, for fewer address lookups."""
    return _mapped(size, "MADV_HUGEPAGE")


def scattered(size: int) -> NDArray[np.uint8]:
    """Zeroed bytes that start on a page, of which only the small pages that are used take memory.

    NumPy asks for huge pages, and a token's keys and values lie all over the pool: one token would touch all of it.
    """
    return _mapped(size, "MADV_NOHUGEPAGE")


def _mapped(size: int, advice: str) -> NDArray[np.uint8]:
    try:
        room = mmap.mmap(-1, max(size, 1))
    except OSError as error:  # a limit of the process, such as ulimit -v
        raise MemoryError(f"there is no room for {size} bytes") from error
    if hasattr(mmap, advice):
        with suppress(OSError):
            room.madvise(getattr(mmap, advice))
    return np.frombuffer(room, np.uint8, size)
