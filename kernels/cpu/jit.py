"""The one decorator of compiled code: no GIL, cached on disk under a key that changes with any kernel's source."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba

from svdengine.kernels.cpu.isa import active_isa
from svdengine.kernels.user_cache import user_cache_directory

# What compiled code takes from outside this folder, as constants: the formats' codes, sizes of blocks.
_SHARED = tuple(Path(__file__).parents[1] / name for name in ("formats.py", "lowbit.py", "batch.py"))


@cache
def kernel_cache_directory() -> Path:
    """Compiled kernels of exactly these sources, this instruction set and these compilers.

    Numba's own cache looks only at the file of the outermost function, so an edit of a callee would go unseen.
    """
    digest = hashlib.sha256()
    for source in [*sorted(Path(__file__).parent.rglob("*.py")), *_SHARED]:
        digest.update(source.read_bytes())
    for part in (active_isa(), numba.__version__, llvmlite.__version__, sys.version):
        digest.update(part.encode())
    return user_cache_directory() / "kernels" / digest.hexdigest()[:16]


@contextmanager
def _numba_cache_in(directory: Path) -> Iterator[None]:
    config: Any = numba.config
    before = config.CACHE_DIR
    config.CACHE_DIR = str(directory)
    try:
        yield
    finally:
        config.CACHE_DIR = before


def jit(function: Callable[..., Any]) -> Any:
    """Compile `function` on first use, to run without the GIL; part of the callers' compiled code.

    Python must not call it: there is no wrapper for that, which would be a quarter of the time of compiling.
    There is no fast-math: two callers of a kernel must get the same bits from it, however it is inlined.
    """
    return _compiled_lazily(function)


def inlined(function: Callable[..., Any]) -> Any:
    """As `jit`, in place of each call: for short ones on the hot path, which only choose what is called.

    LLVM by itself left them as calls, one more for each row of a product: a decode step took a fifth longer.
    """
    return _compiled_lazily(function, forceinline=True)


def _compiled_lazily(function: Callable[..., Any], **options: bool) -> Any:
    njit: Any = numba.njit  # its type stubs do not know all options
    return njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, **options)(function)


def entry(function: Callable[..., Any]) -> Any:
    """As `jit`, for the few functions that Python calls: cached on disk."""
    with _numba_cache_in(kernel_cache_directory()):
        return numba.njit(nogil=True, error_model="numpy", cache=True)(function)
