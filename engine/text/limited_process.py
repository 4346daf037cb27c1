"""Work that nothing inside this process can bound: it runs in a child, which is killed when it takes too much.

A library that is busy in C or Rust cannot be interrupted, and one big operation may take all memory. A child process
has a limit of CPU time, one of time, and one of memory, may write no file and start no process, and is started again
when it was killed. It answers one request after the other, in JSON, so that what it sends can do no harm.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

_HEADER = 8  # bytes of the length that stands before each message
_START_SECONDS = 30.0  # a cold disk is slow; nothing of the request was read then
_KEPT_VARIABLES = ("TZ", "LANG", "LC_ALL", "LC_CTYPE", "LC_TIME", "LD_LIBRARY_PATH")

_in_child = False


@dataclass(frozen=True)
class Limits:
    """What one request may take.

    cpu_seconds: of CPU time.
    seconds: by the clock, for a machine that is busy with other things.
    memory: bytes of address space of the child, the Python interpreter included.
    reply: bytes of the answer.
    """

    cpu_seconds: float
    seconds: float
    memory: int
    reply: int = 1 << 26


class WorkLimitError(Exception):
    """The work was stopped; the message says by which limit."""


class NoChildError(Exception):
    """No child process can be started here."""


class LimitedProcess:
    """A child that answers requests with the function `handle` of a module. Safe to use from several threads.

    It starts with the first request, and ends with this object or this process. After a fork, each process has its own.
    """

    def __init__(self, module: str, limits: Limits, packages: Sequence[str]) -> None:
        """module: of this package; it may import those `packages` and the standard library."""
        self._module = module
        self._limits = limits
        self._packages = packages
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._closing: weakref.finalize[..., Any] | None = None

    def ask(self, request: Any) -> Any:
        """The answer of the child, both as JSON. Raises WorkLimitError, and NoChildError when none can be started."""
        with self._lock:
            process = self._running()
            try:
                return self._exchange(process, request)
            except BaseException:
                self._end()
                raise

    def close(self) -> None:
        """End the child; a later request starts a new one."""
        with self._lock:
            self._end()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        self._end()
        process = _start(self._module, self._limits, self._packages)
        self._process, self._owner = process, os.getpid()
        self._closing = weakref.finalize(self, _end_process, process, self._owner)
        try:
            _receive(process, _START_SECONDS, self._limits.reply)
        except (WorkLimitError, EOFError) as error:
            self._end()
            raise NoChildError("the child process did not start") from error
        return process

    def _exchange(self, process: subprocess.Popen[bytes], request: Any) -> Any:
        assert process.stdin is not None
        try:
            _send(process.stdin, json.dumps(request).encode())
        except OSError as error:
            raise WorkLimitError(_why_it_ended(process, self._limits)) from error
        try:
            answer = _receive(process, self._limits.seconds, self._limits.reply)
        except EOFError as error:
            raise WorkLimitError(_why_it_ended(process, self._limits)) from error
        if answer is None:
            raise WorkLimitError(_memory_message(self._limits))
        return answer

    def _end(self) -> None:
        if self._closing is not None:
            self._closing()
        self._process = self._closing = None


def serve(module: str, cpu_seconds: float, memory: int) -> None:
    """The child: answer requests from standard input until it ends."""
    global _in_child
    _in_child = True
    handle = import_module(module).handle
    source, target = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    _limit_this_process(memory)
    _send(target, b'"ready"')
    while True:
        try:
            request = _read(source)
            signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # nobody catches its signal, which ends the process
            answer = json.dumps(handle(request)).encode()
            signal.setitimer(signal.ITIMER_PROF, 0)
        except EOFError:
            return
        except MemoryError:
            _send(target, b"null")
            return
        _send(target, answer)


def _limit_this_process(memory: int) -> None:
    import resource

    limits = [(resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)]
    limits += [(resource.RLIMIT_NPROC, 0), (resource.RLIMIT_NOFILE, 16)]
    for which, limit in limits:
        _, hard = resource.getrlimit(which)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(which, (limit, limit))


def _start(module: str, limits: Limits, packages: Sequence[str]) -> subprocess.Popen[bytes]:
    """A child in a session of its own, where no Ctrl-C reaches it, with little of our environment."""
    if os.name != "posix" or not sys.executable:
        raise NoChildError("this platform has no limits for processes")
    if _in_child:
        raise NoChildError("this process has limits already")
    folders = dict.fromkeys(_folder(name) for name in (__package__.partition(".")[0], *packages))
    run = f"serve({module!r}, {limits.cpu_seconds!r}, {limits.memory!r})"
    code = f"import sys; sys.path[:0] = {list(folders)!r}; from {__name__} import serve; {run}"
    environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    environment["MALLOC_ARENA_MAX"] = "1"  # arenas are address space
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        raise NoChildError(f"no child process can be started: {error}") from error


def _folder(package: str) -> str:
    """Where a package lies: a child looks there and nowhere else."""
    file = import_module(package).__file__
    if file is None:
        raise NoChildError(f"the package {package} is no folder")
    return str(Path(file).absolute().parents[1])


def _end_process(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:  # after a fork it is the other process's
        return
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # what was left to be written has no reader
                pipe.close()


def _why_it_ended(process: subprocess.Popen[bytes], limits: Limits) -> str:
    if process.wait() == -signal.SIGPROF:
        return f"it took more than {limits.cpu_seconds:g} s"
    return _memory_message(limits)  # a library that gets no memory ends the process in its own way


def _memory_message(limits: Limits) -> str:
    return f"it needs more than {limits.memory >> 20} MB"


def _send(target: Any, message: bytes) -> None:
    target.write(len(message).to_bytes(_HEADER, "big") + message)
    target.flush()


def _read(source: BinaryIO) -> Any:
    size = source.read(_HEADER)
    if len(size) < _HEADER:
        raise EOFError
    return json.loads(source.read(int.from_bytes(size, "big")))


def _receive(process: subprocess.Popen[bytes], seconds: float, most: int) -> Any:
    """The next message of a child. Raises WorkLimitError when it comes too late, EOFError when the child ended."""
    deadline = time.monotonic() + seconds
    size = int.from_bytes(_read_until(process, _HEADER, deadline, seconds), "big")
    if size > most:
        raise WorkLimitError(f"its answer has more than {most >> 20} MB")
    try:
        return json.loads(_read_until(process, size, deadline, seconds))
    except (ValueError, RecursionError) as error:
        raise WorkLimitError("its answer cannot be read") from error


def _read_until(process: subprocess.Popen[bytes], count: int, deadline: float, seconds: float) -> bytes:
    import select

    assert process.stdout is not None
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    parts, left = [], count
    while left:
        wait = deadline - time.monotonic()
        if wait <= 0 or not poll.poll(wait * 1000):
            raise WorkLimitError(f"it took more than {seconds:g} s by the clock")
        part = os.read(process.stdout.fileno(), min(left, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
