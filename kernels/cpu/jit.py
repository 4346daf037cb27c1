"""The one decorator of compiled code: no GIL, cached on disk under a key that changes with any kernel's source."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator

from svdengine.kernels.cpu.isa import active_isa
from svdengine.kernels.user_cache import user_cache_directory

# What compiled code takes from outside this folder, as constants: the formats' codes, sizes of blocks.
_SHARED = tuple(Path(__file__).parents[1] / name for name in ("formats.py", "lowbit.py", "batch.py"))

_NOT_COMPILED = ("executor.py", "compilation.py", "aligned.py", "kv_blocks.py", "place.py", "isa.py")  # Python alone


@cache
def kernel_cache_directory() -> Path:
    """Compiled kernels of exactly these sources, this instruction set and these compilers.

    Numba's own cache looks only at the file of the outermost function, so an edit of a callee would go unseen.
    """
    digest = hashlib.sha256()
    sources = [source for source in sorted(Path(__file__).parent.rglob("*.py")) if source.name not in _NOT_COMPILED]
    for source in [*sources, *_SHARED]:
        digest.update(source.read_bytes())
    for part in (active_isa(), numba.__version__, llvmlite.__version__, sys.version):
        digest.update(part.encode())
    return user_cache_directory() / "kernels" / digest.hexdigest()[:16]


class _BySources(_CacheLocator):
    """Where Numba keeps a function's compiled code: under the digest of all sources, wherever they are installed.

    Numba's own places go by the path and the time of the source file, so that a second environment with the same
    sources, or an image that brings compiled kernels along, would compile them again.
    """

    def __init__(self, line: int) -> None:
        self._line = line

    @classmethod
    def from_function(cls, py_func: Callable[..., Any], py_file: str) -> _BySources:
        return cls(py_func.__code__.co_firstlineno)

    def get_cache_path(self) -> str:
        return str(kernel_cache_directory())

    def get_source_stamp(self) -> str:
        return kernel_cache_directory().name

    def get_disambiguator(self) -> str:
        return str(self._line)


class _CacheBySources(FunctionCache):
    class _impl_class(CompileResultCacheImpl):
        _locator_classes: Any = [_BySources]  # noqa: RUF012  # as in the base class


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
    dispatcher: Any = numba.njit(nogil=True, error_model="numpy")(function)
    dispatcher._cache = _CacheBySources(function)  # as `enable_caching` does, with another place
    return dispatcher
