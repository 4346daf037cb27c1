"""Work on all cores inside one process: parts of an array, each by a thread, for code that leaves the GIL alone."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from svdengine.kernels.cores import default_threads

Result = TypeVar("Result")


def over_parts(work: Callable[[slice], Result], count: int, least: int = 1, size: int | None = None) -> list[Result]:
    """`work` on slices that cover 0..count, in order, as many at a time as there are cores.

    The slices are of `size`, which keeps a part in the cache; without it there is one a core. None is shorter than
    `least`, but for the last. Matrix products have threads of their own, and belong in `work` only under
    `one_blas_thread`.
    """
    threads = default_threads()
    step = max(least, -(-count // threads) if size is None else size, 1)
    parts = [slice(start, min(start + step, count)) for start in range(0, count, step)]
    if len(parts) < 2 or threads == 1:
        return [work(part) for part in parts]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, parts))


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """NumPy's products and decompositions take one thread each, so that `over_parts` can have many of them at a time.

    Threads of several at once would wait for each other at full speed: five times the work, for nothing. Where NumPy
    was built with another library than OpenBLAS, nothing changes.
    """
    library = _openblas()
    if library is None:
        yield
        return
    before = library.threads()
    library.set_threads(1)
    try:
        yield
    finally:
        library.set_threads(before)


class _OpenBlas(NamedTuple):
    """How many threads it works with."""

    threads: Callable[[], int]
    set_threads: Callable[[int], Any]


@cache
def _openblas() -> _OpenBlas | None:
    """The library that came with NumPy, which has it loaded, under either of the names of its functions."""
    package = Path(np.__file__).parent
    for folder in (package.with_name("numpy.libs"), package / ".dylibs"):
        for path in folder.glob("*openblas*"):
            library = ctypes.CDLL(str(path))
            for prefix, suffix in (("scipy_", "64_"), ("", "64_"), ("", "")):
                get = getattr(library, f"{prefix}openblas_get_num_threads{suffix}", None)
                put = getattr(library, f"{prefix}openblas_set_num_threads{suffix}", None)
                if get is not None and put is not None:
                    return _OpenBlas(get, put)
    return None
