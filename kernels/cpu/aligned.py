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
    try:
        room = mmap.mmap(-1, max(size, 1))
    except OSError as error:  # a limit of the process, such as ulimit -v
        raise MemoryError(f"there is no room for {size} bytes") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            room.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(room, np.uint8, size)
