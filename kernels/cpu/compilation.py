"""Compiling the kernels once a machine, in processes of their own, and saying so while it lasts."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: processes that start together each compile
    fcntl = None  # type: ignore[assignment]

from svdengine.errors import DeviceError
from svdengine.kernels.cores import default_threads
from svdengine.kernels.cpu.kernel_files import find_kernels, read_kernels, user_folder
from svdengine.kernels.cpu.parts import PARTS

_START = 1.5  # seconds until a compiling process has imported what it needs
_ADVICE = "`svdengine compile` makes them beforehand"


def object_code(parts: Sequence[str], isa: str) -> list[bytes]:
    """Object code of these parts, compiled first where no one has. Raises DeviceError where it cannot be compiled."""
    found = {part: find_kernels(part, isa) for part in parts}
    missing = [part for part, code in found.items() if code is None]
    if missing:
        folder = user_folder(isa)
        with _one_at_a_time(folder):
            missing = [part for part in missing if read_kernels(folder, part) is None]  # another process was first
            if missing:
                with _announced(f"compiling kernels for {isa}, once on this machine, about {estimate(missing)} s"):
                    compile_parts(missing, isa, folder)
        found = {part: code or read_kernels(folder, part) for part, code in found.items()}
    return [code for code in found.values() if code is not None]


def compile_parts(parts: Sequence[str], isa: str, folder: Path) -> None:
    """Compile parts into a folder, in as many processes as there are cores. Raises DeviceError where one fails."""
    if not sys.executable or getattr(sys, "frozen", False):
        raise DeviceError(f"there is no Python to compile kernels with; {_ADVICE}")
    children: list[tuple[subprocess.Popen[bytes], Any]] = []
    try:
        for names in _shares(parts):
            errors = TemporaryFile()  # noqa: SIM115  # closed below
            command = [sys.executable, "-c", _CHILD, isa, str(folder), *names]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
            children.append((subprocess.Popen(command, env=environment, stderr=errors), errors))
        for child, errors in children:
            if child.wait() != 0:
                raise DeviceError(f"kernels for {isa} cannot be compiled: {_last_line(errors, child)}")
    except OSError as error:
        raise DeviceError(f"kernels cannot be compiled: {error}; {_ADVICE}") from error
    finally:
        for child, errors in children:
            child.kill()
            child.wait()
            errors.close()


def estimate(parts: Sequence[str]) -> int:
    """Seconds that compiling takes, on a machine like that of BENCHMARKS.md that does nothing else."""
    return round(max(_START + sum(PARTS[name].seconds for name in names) for names in _shares(parts)))


_CHILD = "import sys; from svdengine.kernels.cpu.build import main; main(sys.argv[1:])"


def _shares(parts: Sequence[str]) -> list[list[str]]:
    """The parts by compiling process, so that all take about as long."""
    shares: list[list[str]] = [[] for _ in range(min(default_threads(), len(parts)))]
    for name in sorted(parts, key=lambda name: -PARTS[name].seconds):
        min(shares, key=lambda share: sum(PARTS[other].seconds for other in share)).append(name)
    return shares


def _last_line(errors: Any, child: subprocess.Popen[bytes]) -> str:
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"the compiling process ended with {child.returncode}"


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder among the processes of this machine, so that those that start together compile once."""
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    with (folder / ".lock").open("a") as file:
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
