"""The decorators of compiled code: without the GIL, and part of their callers' code or called by them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def jit(function: Callable[..., Any]) -> Any:
    """Compile `function` with what calls it, of which LLVM may make it a part.

    Python must not call it: there is no wrapper for that, which would be a quarter of the time of compiling. What
    Python calls are pieces (pieces.py).
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
    # Nothing here allocates, so nothing is counted (_nrt).
    return njit(_nrt=False, nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, **options)(
        function
    )
