"""Files that take their name only when they are whole, and what a program that was killed has left of such.

While one is written it is locked, under the name .NAME.XXXXXXXX.tmp beside its later place. One that nobody has locked
belongs to a program that is gone: the next one that writes into the folder removes it.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows: there an open file cannot be removed anyway
    fcntl = None  # type: ignore[assignment]

_NAME = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp", re.DOTALL)
_BEGIN = b'{"__metadata__"'  # of a header, after its length


def create_temporary(target: Path) -> tuple[Path, BinaryIO]:
    """A new file for what is to become `target`, locked and open for writing. Raises OSError."""
    remove_leftovers(target)
    while True:
        path = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0)
        file = os.fdopen(os.open(path, flags, 0o666), "wb", buffering=0)
        try:
            if not _lock(file, wait=True) or _is_at(file, path):  # else another program took it for a leftover
                return path, file
        except BaseException:
            file.close()
            path.unlink(missing_ok=True)
            raise
        file.close()


def put_in_place(file: BinaryIO, temporary: Path, target: Path) -> None:
    """Make a whole file durable, and give it its name. Raises OSError."""
    os.fsync(file.fileno())
    if fcntl is None:
        file.close()
    temporary.replace(target)  # while it is locked, so that nobody takes it for a leftover
    file.close()


def remove_leftovers(target: Path) -> None:
    """Remove what killed programs have left beside `target`: files to become it, or another one of ours."""
    for path in _candidates(target.parent):
        with contextlib.suppress(OSError), path.open("rb") as file:
            of_target = path.name.startswith(f".{target.name}.") and len(path.name) == len(target.name) + 14
            if (of_target or _is_ours(file)) and (fcntl is None or (_lock(file) and _is_at(file, path))):
                if fcntl is None:
                    file.close()
                path.unlink()


@contextlib.contextmanager
def alone_in(folder: Path, waits: Callable[[], None] | None = None) -> Iterator[bool]:
    """Wait until no other program is in such a block for the folder. False: the system cannot say, so some may be.

    `waits` is called where there is another one.
    """
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waits is not None:
                    waits()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            alone = True
        except OSError:
            alone = False
        yield alone
    finally:
        os.close(descriptor)


def _candidates(folder: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                yield folder / entry.name


def _is_ours(file: BinaryIO) -> bool:
    head = file.read(8 + len(_BEGIN))
    return not head.strip(b"\0") or head[8:] == _BEGIN


def _lock(file: BinaryIO, wait: bool = False) -> bool:
    """Whether the file is locked now: not where another program has it, or the system has no locks for it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except FileNotFoundError:
        return False
