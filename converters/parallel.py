"""Work on all cores inside one process: parts of an array, each by a thread, for code that leaves the GIL alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from svdengine.kernels.cores import default_threads

Result = TypeVar("Result")


def over_parts(work: Callable[[slice], Result], count: int, least: int = 1, size: int | None = None) -> list[Result]:
    """`work` on slices that cover 0..count, in order, as many at a time as there are cores.

    The slices are of `size`, which keeps a part in the cache; without it there is one a core. None is shorter than
    `least`, but for the last. Matrix products have threads of their own, and do not belong in `work`.
    """
    threads = default_threads()
    step = max(least, -(-count // threads) if size is None else size, 1)
    parts = [slice(start, min(start + step, count)) for start in range(0, count, step)]
    if len(parts) < 2 or threads == 1:
        return [work(part) for part in parts]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, parts))
