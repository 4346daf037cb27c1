"""Limits that a control group sets on this process, of either version of cgroups, and those of the groups around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MEMBERSHIP = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")


def memory_limits() -> Iterator[int]:
    """Bytes of memory that the process may take."""
    for folder, first in _folders("memory"):
        with suppress(OSError, ValueError):  # "max": no limit
            yield int((folder / ("memory.limit_in_bytes" if first else "memory.max")).read_text(encoding="ascii"))


def cpu_quotas() -> Iterator[float]:
    """Cores' worth of time that the process may take, as with `docker run --cpus 1.5`."""
    for folder, first in _folders("cpu"):
        with suppress(OSError, ValueError):  # "max", or -1: no limit
            if first:
                quota, period = ((folder / f"cpu.cfs_{what}_us").read_text() for what in ("quota", "period"))
            else:
                quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
            if int(quota) > 0 and int(period) > 0:
                yield int(quota) / int(period)


def _folders(controller: str) -> Iterator[tuple[Path, bool]]:
    """The folders of the groups that the process is in, from the outermost; and whether of the first version."""
    with suppress(OSError):
        for line in MEMBERSHIP.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            root = CGROUPS / controllers if controllers else CGROUPS
            if controllers and not root.is_dir():
                root = CGROUPS / controller
            parts = Path(path.lstrip("/")).parts
            for depth in range(len(parts) + 1):
                yield root.joinpath(*parts[:depth]), bool(controllers)
