"""Programs that a model wrote are run against tests, in a child process that may do little.

The child has limits of time and memory, starts no process, and an audit hook refuses what reaches outside: files but
for reading the standard library, the network, other processes. That keeps a mistake of a model from doing harm. It is
no wall against a program that was written to break out of it, so nothing is run unless the user allows it.
"""

from __future__ import annotations

import sys
from typing import Any

from svdengine.errors import RequestError
from svdengine.text.limited_process import LimitedProcess, Limits, NoChildError, WorkLimitError

LIMITS = Limits(cpu_seconds=5.0, seconds=30.0, memory=512 << 20, reply=1 << 16)

_REFUSED_EVENTS = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "fcntl.", "mmap.", "resource.", "pty.")
_HARMLESS_EVENTS = ("os.listdir", "os.scandir", "os.putenv", "os.unsetenv")  # the first two: looking for a module
_REFUSED_MODULES = ("_posixsubprocess", "_ctypes", "ctypes", "cffi", "_socket", "svdengine")


def run_program(program: str, tests: str) -> str:
    """Run a program and then its tests: "" when no assertion failed, otherwise what went wrong, in a line.

    Raises RequestError where the system has no limits for processes.
    """
    child = LimitedProcess(__name__, LIMITS, ())  # a new one each time: a program may leave anything behind
    try:
        return str(child.ask({"program": program, "tests": tests}))
    except WorkLimitError as error:
        return str(error)
    except NoChildError as error:
        raise RequestError(f"programs of models are only run where processes have limits: {error}") from error
    finally:
        child.close()


def handle(request: Any) -> str:
    """The child's part; see `limited_process`."""
    import io

    sys.stdin = io.StringIO()
    _refuse_what_reaches_outside()
    names: dict[str, Any] = {"__name__": "program"}
    try:
        exec(compile(request["program"], "program", "exec"), names)
        exec(compile(request["tests"], "tests", "exec"), names)
    except MemoryError:
        raise
    except BaseException as error:  # SystemExit is a failure too
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return ""


def _refuse_what_reaches_outside() -> None:
    library = tuple(folder for folder in sys.path if folder.startswith((sys.prefix, sys.base_prefix)))

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            reads = flags & 3 == 0 and not set("wax+").intersection(mode or "")
            if not (reads and str(path).startswith(library)):
                raise PermissionError("files cannot be opened here")
        elif event == "import" and arguments[0].partition(".")[0] in _REFUSED_MODULES:
            raise PermissionError(f"{arguments[0]} cannot be imported here")
        elif event.startswith(_REFUSED_EVENTS) and event not in _HARMLESS_EVENTS:
            raise PermissionError(f"{event} is not available here")

    sys.addaudithook(look)
