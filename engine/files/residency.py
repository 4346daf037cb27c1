"""Which parts of a model file are kept in memory, and how the rest is paged in.

A model that fits into memory is read ahead by the system and stays there. Of one that does not, each token needs the
attention, the embeddings and the predictor, and of the FFN only the rows of active neurons (advising_executor.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from svdengine.files.model_file import ModelFile

_FFN_ROWS = ("gate", "up", "down_T")
_MEMORY = Path("/proc/meminfo")
_MEMBERSHIP = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")


def arrange_memory(
    model_file: ModelFile, *, mlock: bool = False, prefetch: bool = False, memory: int | None = None
) -> bool:
    """Lock and prefetch. `memory`: bytes there are; by default what is left on this machine.

    Returns whether the file fits into memory. Where it does not, only what every token reads is locked and prefetched,
    and the executor is to be an AdvisingExecutor. Raises DeviceError when the system refuses to lock that much.
    """
    memory = usable_memory() if memory is None else memory
    fits = memory is None or model_file.size_bytes < memory
    rows = ffn_row_names(model_file)
    names = [name for name in model_file.arrays if fits or name not in rows]
    if prefetch:
        model_file.prefetch(names)
    if mlock:
        model_file.lock(names)
    return fits


def ffn_row_names(model_file: ModelFile) -> list[str]:
    """The stored arrays of FFN matrices of which sparse execution picks rows.

    Scales are not among them: a page holds those of so many rows that nearly every token reads it.
    """
    if not model_file.config.sparse_ffn:
        return []
    return [name for name in _FFN_ROWS if name in model_file.arrays]


def usable_memory() -> int | None:
    """Bytes that a model may take: what other programs leave of the machine's memory, or a control group's limit."""
    limits = [memory_bytes(), *_cgroup_limits()]
    with suppress(OSError, StopIteration):
        lines = _MEMORY.read_text(encoding="ascii").splitlines()
        limits.append(1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))))
    known = [limit for limit in limits if limit]
    return min(known) if known else None


def _cgroup_limits() -> Iterator[int]:
    """Memory limits of this process's control group and of those around it, of either version of cgroups."""
    with suppress(OSError):
        for line in _MEMBERSHIP.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            root, name = (_CGROUPS / "memory", "memory.limit_in_bytes") if controllers else (_CGROUPS, "memory.max")
            parts = Path(path.lstrip("/")).parts
            for depth in range(len(parts) + 1):
                with suppress(OSError, ValueError):  # "max": no limit
                    yield int(root.joinpath(*parts[:depth], name).read_text(encoding="ascii"))


def memory_bytes() -> int | None:
    """Bytes of memory in the machine, where it says."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
