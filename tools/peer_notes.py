"""What figures of a comparison depend on: processor, threads, versions."""

from __future__ import annotations

import platform
import re
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from svdengine import __version__


def cpu_name() -> str:
    """The processor as the system calls it."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def machine_notes(threads: int, repetitions: int, library: bool) -> list[str]:
    """Lines for below a table; `library`: llama.cpp is that of llama-cpp-python."""
    notes = [
        f"{date.today()}, {cpu_name()}, {threads} threads, medians of {repetitions} ± standard deviation, in turn;"
        f" svdengine {__version__}. Of seconds and MiB less is better."
    ]
    if library:
        notes.append(f"llama.cpp is that of llama-cpp-python {_version('llama-cpp-python')}.")
    return notes


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of an unknown version"
