"""Other programs that keep cores busy, to measure beside."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from svdengine.errors import SvdEngineError

_PROGRAM = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nprint(flush=True)\nwhile True: pass"


def usable_cores() -> list[int]:
    """The cores that this process may run on. Raises SvdEngineError where the system cannot tell."""
    if not hasattr(os, "sched_getaffinity"):
        raise SvdEngineError("this system cannot put a program on one core; measure beside busy programs on Linux")
    return sorted(os.sched_getaffinity(0))


@contextmanager
def busy(cores: Sequence[int]) -> Iterator[None]:
    """While this lasts, a program computes on each of the cores, as much as it gets. Raises SvdEngineError."""
    with ExitStack() as stack:
        for core in cores:
            command = [sys.executable, "-S", "-c", _PROGRAM, str(core)]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL))
            stack.callback(process.kill)
            assert process.stdout is not None
            if not process.stdout.readline():
                raise SvdEngineError(f"a program that was to keep core {core} busy did not start")
        yield
