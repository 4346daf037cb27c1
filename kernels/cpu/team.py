"""A team of resident threads that run a step together: one compiled call a thread, spin barriers inside."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.cpu.workspace import CALLED, ENDED, EPOCH, PARKED


class Team:
    """Threads 1.. of a step wait here for work; the caller's thread is member 0.

    `member_loop(member, sync, seen) -> epoch` is the compiled function that waits and works; it returns its last epoch
    after a while without work, so that an idle team sleeps, or -1 to end. `call_members` is that of step.py.
    """

    def __init__(
        self,
        threads: int,
        member_loop: Callable[[int, NDArray[np.int64], int], int],
        call_members: Callable[[int, int, int], int],
    ) -> None:
        self.threads = threads
        # 64-byte lines: an offset puts field 0 at the start of one.
        room = np.zeros(PARKED + 8 * (threads + 1) + 8, np.int64)
        skip = (-room.ctypes.data % 64) // 8
        self.sync: NDArray[np.int64] = room[skip : skip + PARKED + 8 * (threads + 1)]
        self._loop, self._call_members = member_loop, call_members
        self._parked = np.zeros(threads, np.int64)
        self._events = [threading.Event() for _ in range(threads)]
        self._members: list[threading.Thread] = []

    def start(self) -> None:
        """Start the threads; the compiled loop must be ready."""
        for i in range(1, self.threads):
            member = threading.Thread(target=self._serve, args=(i,), name=f"svdengine-{i}", daemon=True)
            member.start()
            self._members.append(member)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Members wait for the next step in compiled code, awake, while the caller runs its own part of one.

        An interruption in here leaves no member waiting for the others: a step begins inside the caller's part.
        """
        try:
            self._call_members(self.sync.ctypes.data, self.threads, self._parked.ctypes.data)
            for member in range(1, self.threads):
                if self._parked[member]:
                    self._events[member].set()
            yield
        finally:
            self.sync[CALLED] = 0

    def close(self) -> None:
        """End the threads."""
        if self._members:
            with self.awake():
                self.sync[EPOCH] = ENDED
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
