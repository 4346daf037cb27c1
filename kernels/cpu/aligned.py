"""Memory for compiled code."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_LINE = 64  # bytes of a cache line


def aligned(size: int) -> NDArray[np.uint8]:
    """Zeroed bytes that start on a cache line."""
    room = np.zeros(size + _LINE, np.uint8)
    skip = -room.ctypes.data % _LINE
    return room[skip : skip + size]
