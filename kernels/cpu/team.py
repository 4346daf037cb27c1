"""A team of resident threads that run a step together: one compiled call a thread, spin barriers inside."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.cpu.jit import entry
from svdengine.kernels.cpu.sync import EPOCH, PARKED, STOP, exchange, fetch_add, load_shared


@entry
def announce(sync: Any, threads: int, awake: Any) -> None:
    """Raise the epoch, then note in `awake` which members had parked and must be woken."""
    at = sync.ctypes.data
    fetch_add(at + 8 * EPOCH, 1)
    for member in range(1, threads):
        flag = at + 8 * (PARKED + 8 * member)
        awake[member] = 0
        if load_shared(flag) != 0:
            exchange(flag, 0)
            awake[member] = 1


class Team:
    """Threads 1.. of a step wait here for work; the caller's thread is member 0.

    `member_loop(member, sync, seen) -> epoch` is the compiled function that waits and works; it returns its last epoch
    after a while without work, so that an idle team sleeps, or -1 to end.
    """

    def __init__(self, threads: int, member_loop: Callable[[int, NDArray[np.int64], int], int]) -> None:
        self.threads = threads
        # 64-byte lines: an offset puts field 0 at the start of one.
        room = np.zeros(PARKED + 8 * (threads + 1) + 8, np.int64)
        skip = (-room.ctypes.data % 64) // 8
        self.sync: NDArray[np.int64] = room[skip : skip + PARKED + 8 * (threads + 1)]
        self._loop = member_loop
        self._woken = np.zeros(threads, np.int64)
        self._events = [threading.Event() for _ in range(threads)]
        self._members: list[threading.Thread] = []

    def start(self) -> None:
        """Start the threads; the compiled loop must be ready."""
        for i in range(1, self.threads):
            member = threading.Thread(target=self._serve, args=(i,), name=f"svdengine-{i}", daemon=True)
            member.start()
            self._members.append(member)

    def start_step(self) -> None:
        """Let every member run one step; the caller must run its own part at once."""
        announce(self.sync, self.threads, self._woken)
        for member in range(1, self.threads):
            if self._woken[member]:
                self._events[member].set()

    def close(self) -> None:
        """End the threads."""
        if self._members:
            self.sync[STOP] = 1
            self.start_step()
            for member in self._members:
                member.join()
            self._members = []

    def _serve(self, member: int) -> None:
        seen = 0
        while True:
            seen = self._loop(member, self.sync, seen)
            if seen < 0:
                return
            self._events[member].wait()
            self._events[member].clear()
