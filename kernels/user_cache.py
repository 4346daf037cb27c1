"""Where this user's files lie that can be made again, and what is done where there is no such place."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path

from svdengine.errors import SvdEngineError

_ADVICE = "set LOCALAPPDATA" if os.name == "nt" else "set XDG_CACHE_HOME"


def user_cache_directory() -> Path:
    """svdengine's folder of compiled kernels, operators and models to measure with; it is there and can be written to.

    Where the user has none, as in a container without a home, it is one that ends with this process, which standard
    error is told once. Raises SvdEngineError where there is no room for that either.
    """
    try:
        return lasting_cache_directory()
    except SvdEngineError as error:
        return _passing_directory(str(error))


def lasting_cache_directory() -> Path:
    """The same, for what is too dear to be made for one process. Raises SvdEngineError, with what to set."""
    try:
        folder = _base() / "svdengine"
    except (RuntimeError, KeyError) as error:  # no HOME, and a user that the system does not know
        raise SvdEngineError(f"there is no home folder, and so no cache folder; {_ADVICE}") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise SvdEngineError(f"cannot make the cache folder {folder}: {reason}; {_ADVICE}") from error
    return folder


def _base() -> Path:
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


@cache
def _passing_directory(reason: str) -> Path:
    """A folder of this process, for this user alone: what lies in it is code."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="svdengine-"))
    except OSError as error:
        raise SvdEngineError(f"{reason}; there is no folder for temporary files either ({error.strerror})") from error
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # a forked process may end before this one
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    print(f"nothing is kept from this run, such as compiled kernels: {reason} to a folder", file=sys.stderr, flush=True)
    return folder
