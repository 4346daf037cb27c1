"""Where compiled kernels lie: files of object code, in a folder for exactly these sources and an instruction set.

They are looked for in what was brought along, which is only read, and then in the user's cache: the folders that
SVDENGINE_KERNELS names, and the installed package `svdengine_kernels`. The folder's name has a digest of the sources,
so that an edit is never missed, wherever they are installed. A file begins with a digest of the code in it.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from functools import cache
from pathlib import Path

from svdengine.kernels.brought_along import folders_brought_along
from svdengine.kernels.cpu.isa import target_of
from svdengine.kernels.user_cache import user_cache_directory

_HEADER = b"svdengine kernels 1\n"

# What compiled code takes from outside this folder, as constants: the formats' codes, sizes of blocks.
_SHARED = tuple(Path(__file__).parents[1] / name for name in ("formats.py", "lowbit.py", "batch.py"))

# Python alone, of no effect on compiled code.
_NOT_COMPILED = frozenset(
    f"{name}.py"
    for name in (
        *(
            "aligned",
            "arm_features",
            "bandwidth",
            "compilation",
            "executor",
            "kernel_files",
            "kv_blocks",
            "library",
            "panels",
        ),
        *("place", "row_bounds", "team"),
    )
)


@cache
def folder_name(isa: str) -> str:
    """The folder of kernels for an instruction set, compiled from exactly these sources."""
    digest = hashlib.sha256(_HEADER)
    sources = [source for source in sorted(Path(__file__).parent.rglob("*.py")) if source.name not in _NOT_COMPILED]
    for source in [*sources, *_SHARED]:
        digest.update(source.read_bytes())
    for part in target_of(isa):
        digest.update(part.encode() + b"\0")
    return f"{isa}-{digest.hexdigest()[:16]}"


def user_folder(isa: str) -> Path:
    """The folder in the user's cache, or, where there is none, in one that ends with this process."""
    return user_cache_directory() / "kernels" / folder_name(isa)


def find_kernels(part: str, isa: str) -> bytes | None:
    """Object code of a part, from what was brought along or the user's cache."""
    for folder in folders_brought_along():
        if (code := read_kernels(folder / folder_name(isa), part)) is not None:
            return code
    return read_kernels(user_folder(isa), part)


def read_kernels(folder: Path, part: str) -> bytes | None:
    """Object code of a part in a folder of an instruction set; None where there is none, or it is damaged."""
    try:
        data = (folder / f"{part}.o").read_bytes()
    except OSError:
        return None
    start = len(_HEADER) + hashlib.sha256().digest_size
    code = data[start:]
    return code if data[:start] == _HEADER + hashlib.sha256(code).digest() else None


def write_kernels(folder: Path, part: str, code: bytes) -> None:
    """Keep object code, as a whole file or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{part}.{os.getpid()}"
    try:
        temporary.write_bytes(_HEADER + hashlib.sha256(code).digest() + code)
        temporary.replace(folder / f"{part}.o")
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
