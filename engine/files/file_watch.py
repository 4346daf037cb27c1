"""Noticing that a file which is mapped into memory was changed: its pages may hold other bytes now, or be gone.

A file that is replaced by another one of its name is no change: the map keeps the old one. A write into the file itself
is. Kernels that read a page beyond the new end are stopped by the system with SIGBUS, and the process with them, so
this is asked before each step. What is cut off in the middle of a step cannot be noticed in time; bus_error.py then has
the last word.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from svdengine.errors import ModelFileError
from svdengine.files.bus_error import add_mapped, remove_mapped
from svdengine.files.tensor_file import open_regular

_ADVICE = "write a new version to a name of its own and rename it (mv); then load it again"


class FileWatch:
    """Knows the size and the time of a file as they were; whoever makes one closes it."""

    def __init__(self, path: Path) -> None:
        """Raises ModelFileError when the file cannot be opened."""
        self.path = path
        self._file = open_regular(path)
        self._size, self._time = self._now()
        add_mapped(path)

    def check(self) -> None:
        """Raise ModelFileError when the file was written to since. It takes microseconds."""
        size, time = self._now()
        if (size, time) == (self._size, self._time):
            return
        if size != self._size:
            what = f"was {self._size} bytes long and has {size} now"
        else:
            what = "was written to, or its time was set"
        raise ModelFileError(f"{self.path}: the file was changed while it was in use: it {what}; {_ADVICE}")

    def close(self) -> None:
        """Let go of the file. Closing twice is fine."""
        if not self._file.closed:
            remove_mapped(self.path)
        self._file.close()

    def _now(self) -> tuple[int, int]:
        """Of the file that was opened, whatever its name stands for by now."""
        state = os.fstat(self._file.fileno())
        return state.st_size, state.st_mtime_ns


def check_files(watches: Iterable[FileWatch]) -> None:
    """Raise ModelFileError when one of the files was written to."""
    for watch in watches:
        watch.check()
