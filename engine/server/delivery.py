"""From the thread that runs the model to the coroutine that answers a client."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress

from svdengine.server.request_loop import Update


class Delivery:
    """Updates of the requests of one client. What the client has not taken yet is joined, one update a request."""

    def __init__(self) -> None:
        """To be made on the event loop that takes the updates."""
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._lock = threading.Lock()
        self._waiting: dict[int, Update] = {}
        self._woken = False

    def push(self, index: int, update: Update) -> None:
        """Hand over an update of request `index`; from any thread."""
        with self._lock:
            before = self._waiting.get(index)
            self._waiting[index] = update if before is None else before.joined(update)
            wake, self._woken = not self._woken, True
        if wake:
            with suppress(RuntimeError):  # the event loop was closed
                self._loop.call_soon_threadsafe(self._arrived.set)

    async def take(self, seconds: float) -> dict[int, Update]:
        """All that waits, by request; it waits for something, `seconds` at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._arrived.wait()
        self._arrived.clear()
        with self._lock:
            taken, self._waiting, self._woken = self._waiting, {}, False
        return taken
