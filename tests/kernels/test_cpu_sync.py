"""The barrier of a team: nobody goes on before all have come, and nobody sleeps for ever."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from kernel_harness import Kernel, at

from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.sync import barrier, fetch_add, load_shared
from svdengine.kernels.cpu.workspace import ASLEEP, PARKED


@jit
def meet(sync, threads, count, rounds, busy):
    """Count up and wait for the others, `rounds` times; gives how often somebody had not counted yet."""
    early = 0
    for number in range(1, rounds + 1):
        for _ in range(busy):
            load_shared(sync)
        fetch_add(count, 1)
        barrier(sync, threads)
        if load_shared(count) != number * threads:
            early += 1
        barrier(sync, threads)
    return early


@pytest.mark.parametrize("threads", [2, 5])  # as many as cores, perhaps, and more: some are always without a core
def test_all_meet_though_some_are_late(threads: int) -> None:
    call = Kernel(meet)
    sync, count = np.zeros(PARKED, np.int64), np.zeros(1, np.int64)
    call(at(sync), 1, at(count), 1, 0)  # compiled before the threads start
    count[0] = 0
    early = [1] * threads

    def member(i: int) -> None:
        # Those that are busier come so late that the others sleep.
        early[i] = call(at(sync), threads, at(count), 60, 200_000 if i == threads - 1 else 10 * i)

    members = [threading.Thread(target=member, args=(i,), daemon=True) for i in range(threads)]
    for thread in members:
        thread.start()
    for thread in members:
        thread.join(120)
    assert not any(thread.is_alive() for thread in members)
    assert early == [0] * threads
    assert sync[ASLEEP] == 0
