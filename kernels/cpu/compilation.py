"""Compiling the kernels once a machine, and saying so while it lasts."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numba

try:
    import fcntl
except ImportError:  # Windows: processes that start together each compile
    fcntl = None  # type: ignore[assignment]

from svdengine.kernels.cpu.isa import active_isa
from svdengine.kernels.cpu.jit import kernel_cache_directory


def compile_entry(function: Any, *arguments: Any) -> None:
    """Compile an entry for arguments of these types, or load it from the disk cache.

    Only a compilation is announced, on standard error: it takes tens of seconds and happens once.
    """
    signature = tuple(numba.typeof(argument) for argument in arguments)
    if signature in function.overloads:
        return
    name = function.py_func.__name__
    if _is_compiled(name):
        function.compile(signature)
        return
    with _announced(f"compiling kernels for {active_isa()}, once on this machine"), _one_at_a_time(name):
        function.compile(signature)  # from the cache, if another process was first


def _is_compiled(name: str) -> bool:
    return any(kernel_cache_directory().glob(f"*.{name}-*.nbi"))


@contextmanager
def _one_at_a_time(name: str) -> Iterator[None]:
    """Hold the lock of a kernel among the processes of this machine, so that those that start together compile once."""
    if fcntl is None:
        yield
        return
    kernel_cache_directory().mkdir(parents=True, exist_ok=True)
    with (kernel_cache_directory() / f"{name}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed, which the end of a process does too
        yield


@contextmanager
def _announced(what: str) -> Iterator[None]:
    """Show what is going on and for how long: ticking on a terminal, else one line."""
    start, done = time.perf_counter(), threading.Event()
    terminal = sys.stderr.isatty()

    def tick() -> None:
        while not done.wait(1.0):
            print(f"\r{what}: {time.perf_counter() - start:.0f} s ", end="", file=sys.stderr, flush=True)

    ticker = threading.Thread(target=tick, daemon=True)
    if terminal:
        ticker.start()
    else:
        print(f"{what} ...", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        done.set()
        if terminal:
            ticker.join()
            print(f"\r{what}: {time.perf_counter() - start:.0f} s ", file=sys.stderr, flush=True)
