"""Which parts of a model file are kept in memory, and how the rest is paged in.

A model that fits into memory is read ahead by the system and stays there. Of one that does not, each token needs the
attention, the embeddings and the predictor, and of the FFN only the rows of active neurons: those are scattered, so
that reading ahead around them would only push out what is needed.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from svdengine.machine import memory_bytes

if TYPE_CHECKING:
    from svdengine.model_file import ModelFile

_FFN_ROWS = ("gate", "up", "down_T")
_SUFFIXES = ("", ".scale", ".min", ".row")
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def arrange_memory(
    model_file: ModelFile, *, sparse: bool, mlock: bool = False, prefetch: bool = False, memory: int | None = None
) -> None:
    """Lock, prefetch, and say how the FFN's rows will be read. `memory`: bytes there are; by default this machine's.

    Where the file is larger than memory, only what every token reads is locked and prefetched. Raises DeviceError when
    the system refuses to lock that much.
    """
    memory = usable_memory() if memory is None else memory
    fits = memory is None or model_file.size_bytes < memory
    rows = ffn_row_names(model_file)
    names = [name for name in model_file.arrays if fits or name not in rows]
    if sparse and not fits:
        model_file.advise(rows, "random")
    if prefetch:
        model_file.prefetch(names)
    if mlock:
        model_file.lock(names)


def ffn_row_names(model_file: ModelFile) -> list[str]:
    """The stored arrays of FFN matrices whose rows sparse execution picks."""
    if not model_file.config.sparse_ffn:
        return []
    stored = (name + suffix for name in _FFN_ROWS for suffix in _SUFFIXES)
    return [name for name in stored if name in model_file.arrays]


def usable_memory() -> int | None:
    """Bytes that this process may use: the machine's memory, or its container's limit where that is lower."""
    limits = [memory_bytes()]
    for path in _CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # "max": no limit
            limits.append(int(Path(path).read_text(encoding="ascii")))
    known = [limit for limit in limits if limit]
    return min(known) if known else None
