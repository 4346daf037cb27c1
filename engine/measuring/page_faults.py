"""Page faults and disk reads of this process: what a model that is larger than memory costs while it runs."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from svdengine.errors import DeviceError


@dataclass(frozen=True)
class PageFaults:
    """Totals since the process began, or between two moments."""

    minor: int  # the page was in memory already
    major: int  # it had to be read
    disk_bytes: int  # read from storage, with what was read ahead; 0 where the system does not say

    def since(self, before: PageFaults) -> PageFaults:
        """What was added after `before`."""
        return PageFaults(
            self.minor - before.minor, self.major - before.major, max(0, self.disk_bytes - before.disk_bytes)
        )


def page_faults() -> PageFaults:
    """So far. Raises DeviceError where the system does not count them."""
    try:
        import resource
    except ImportError:
        raise DeviceError("page faults are not counted on this system; leave --faults out") from None
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return PageFaults(usage.ru_minflt, usage.ru_majflt, _disk_bytes())


def _disk_bytes() -> int:
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines():
            if line.startswith("read_bytes:"):
                return int(line.split(":")[1])
    return 0
