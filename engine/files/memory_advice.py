"""What the system is told about the pages of a memory map: how they will be read, and which must stay in memory."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from svdengine.errors import DeviceError

Advice = Literal["random", "sequential", "willneed", "normal", "dontneed"]


def advise(pages: mmap.mmap, start: int, end: int, advice: Advice) -> None:
    """Say how bytes start..end will be read. A hint: where the system takes none, nothing happens."""
    option = getattr(mmap, f"MADV_{advice.upper()}", None)
    if option is None or end <= start:
        return
    begin = start // mmap.PAGESIZE * mmap.PAGESIZE
    pages.madvise(option, begin, end - begin)


def forget(pages: mmap.mmap, path: Path, ranges: Sequence[tuple[int, int]]) -> None:
    """Have the system take back what it holds of ranges (start, end) of a mapped file: from the map, and its cache."""
    for start, end in ranges:
        advise(pages, start, end, "dontneed")
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError), path.open("rb") as file:
            for start, end in ranges:
                os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_DONTNEED)


def prefetch(pages: mmap.mmap, start: int, end: int) -> None:
    """Read bytes start..end into memory, and wait for them."""
    if end <= start:
        return
    advise(pages, start, end, "willneed")
    np.frombuffer(pages, np.uint8, end - start, start)[:: mmap.PAGESIZE].max()


def lock(pages: mmap.mmap, start: int, end: int) -> None:
    """Keep bytes start..end in memory until the map is closed. Raises DeviceError when that is not permitted."""
    if end <= start:
        return
    lock_array(np.frombuffer(pages, np.uint8, end - start, start))


def lock_array(array: NDArray[Any]) -> None:
    """Keep an array in memory for as long as it is there. Raises DeviceError when that is not permitted."""
    number = _mlock(array.ctypes.data, array.nbytes)
    if number:
        raise DeviceError(
            f"the system does not let this process lock {array.nbytes / 1e6:.1f} MB of memory"
            f" ({os.strerror(number)}{_limit()}); raise the limit (ulimit -l unlimited), or leave mlock out"
        )


def _mlock(address: int, size: int) -> int:
    """The system's error number, or 0."""
    library = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    if not hasattr(library, "mlock"):
        raise DeviceError("memory cannot be locked on this system; leave mlock out")
    library.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)  # type: ignore[union-attr]
    return ctypes.get_errno() if library.mlock(address, size) else 0  # type: ignore[union-attr]


def _limit() -> str:
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    except (ImportError, OSError):
        return ""
    return "" if limit == resource.RLIM_INFINITY else f"; the limit is {limit / 1e6:.1f} MB"
