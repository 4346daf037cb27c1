"""How many threads a step is worth on this machine."""

from __future__ import annotations

import os

from svdengine.kernels.control_groups import cpu_quotas


def default_threads() -> int:
    """Cores that this process may use: those it may run on, or as many as its control group's share of time is worth.

    A team that is larger than its share of time is stopped in the middle of a step, all of it, for most of a period.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count() or 1
    return max(1, min(cores, *(int(quota) for quota in cpu_quotas()), cores))
