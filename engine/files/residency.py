"""Which parts of a model file are kept in memory, and how the rest is paged in.

A model that fits into memory is read ahead by the system and stays there. Of one that does not, each token needs the
attention, the embeddings and the predictor, and of the FFN only the rows of active neurons (advising_executor.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from svdengine.files.memory_advice import lock_array
from svdengine.kernels.control_groups import memory_limits
from svdengine.kernels.formats import PART_SUFFIXES

if TYPE_CHECKING:
    from svdengine.files.model_file import ModelFile

_FFN_ROWS = ("gate", "up", "down_T", "down")
_MEMORY = Path("/proc/meminfo")
_RESIDENT = Path("/proc/self/statm")
_PROGRAM = 96 << 20  # bytes of code of Python and its libraries that are mapped


@dataclass(frozen=True)
class Room:
    """How much of a model the memory holds."""

    whole: bool  # the file; where it does not fit, the executor is to be an AdvisingExecutor
    copies: bool  # also matrices a second time for a while, as when the CPU interleaves them


def room_for(model_file: ModelFile, memory: int | None = None) -> Room:
    """What of a model fits into `memory` bytes; by default what is left on this machine."""
    memory = usable_memory() if memory is None else memory
    if memory is None:
        return Room(True, True)
    return Room(model_file.size_bytes < memory, model_file.size_bytes * 3 // 2 < memory)


def read_by_every_token(model_file: ModelFile, room: Room) -> list[str]:
    """The stored arrays that are worth locking and prefetching: all, but for FFN rows where there is no room.

    Of experts, which a token has few of, nothing.
    """
    rows = block_arrays(model_file) if model_file.config.expert_count else ffn_row_names(model_file)
    return [name for name in model_file.arrays if room.whole or name not in rows]


def settle(
    model_file: ModelFile, room: Room, copied: Sequence[str], copies: Sequence[NDArray[Any]], *, mlock: bool
) -> None:
    """After an executor was opened: let go of the file's pages of matrices that it copied; lock the rest, and copies.

    copied: names of matrices; of an embedding that is the lm_head too, single rows are still read in the file. Raises
    DeviceError when the system refuses to lock that much.
    """
    let_go = let_go_of(model_file, copied)
    if mlock:
        unread = {name for name in let_go if name.split(".")[0] != "embedding"}
        model_file.lock([name for name in read_by_every_token(model_file, room) if name not in unread])
        for array in copies:
            lock_array(array)


def let_go_of(model_file: ModelFile, copied: Sequence[str]) -> set[str]:
    """Let go of the file's pages of matrices that are read as copies, and give the names of their stored arrays."""
    names = {name + suffix for name in copied for suffix in PART_SUFFIXES}
    model_file.advise([name for name in model_file.arrays if name in names], "dontneed")
    return names


def ffn_row_names(model_file: ModelFile) -> list[str]:
    """The stored arrays of FFN matrices of which sparse execution picks rows.

    Scales are not among them: a page holds those of so many rows that nearly every token reads it. Of experts a token
    has few, whether any of their rows can be skipped or not.
    """
    if not model_file.config.sparse_ffn and not model_file.config.expert_count:
        return []
    return [name for name in _FFN_ROWS if name in model_file.arrays]


def block_arrays(model_file: ModelFile) -> list[str]:
    """The stored arrays of FFN matrices, of which each FFN block, as of an expert, has a part of its own."""
    names = (row + suffix for row in _FFN_ROWS for suffix in PART_SUFFIXES)
    return [name for name in names if name in model_file.arrays]


def always_read(model_file: ModelFile) -> int:
    """Stored bytes of all but the FFNs."""
    rows = block_arrays(model_file)
    return sum(array.nbytes for name, array in model_file.arrays.items() if name not in rows)


def token_block_bytes(model_file: ModelFile) -> int:
    """Stored bytes of the FFN blocks that one token has, of all layers."""
    config, blocks = model_file.config, sum(model_file.arrays[name].nbytes for name in block_arrays(model_file))
    return round(blocks * config.token_neurons / (config.ffn_size * config.ffn_blocks))


def own_bytes() -> int:
    """Bytes of memory that this process has but for mapped files of data; a guess where the system does not say."""
    with suppress(OSError, ValueError, IndexError, AttributeError):
        _, resident, mapped = map(int, _RESIDENT.read_text(encoding="ascii").split()[:3])
        return _PROGRAM + (resident - mapped) * os.sysconf("SC_PAGE_SIZE")
    return 3 * _PROGRAM


def resident_bytes() -> int | None:
    """Bytes of memory that this process has, mapped files included; None where the system does not say."""
    with suppress(OSError, ValueError, IndexError, AttributeError):
        return int(_RESIDENT.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


def bounded_memory(memory: int) -> int:
    """`memory` bytes, or what a model may take where that is less."""
    usable = usable_memory()
    return memory if usable is None else min(memory, usable)


def usable_memory() -> int | None:
    """Bytes that a model may take: what other programs leave of the machine's memory, or a control group's limit."""
    limits = [memory_bytes(), *memory_limits()]
    with suppress(OSError, StopIteration):
        lines = _MEMORY.read_text(encoding="ascii").splitlines()
        limits.append(1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))))
    known = [limit for limit in limits if limit]
    return min(known) if known else None


def memory_bytes() -> int | None:
    """Bytes of memory in the machine, where it says."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
