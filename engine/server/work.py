"""Work that a client's request causes: whose it is, what it took so far, and whether it is still wanted."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from typing import Any, TypeVar
from weakref import WeakValueDictionary

T = TypeVar("T")

THREADS = 32
THREADS_EACH = 8  # that one client may keep busy, so that four are needed to keep others waiting

client: ContextVar[str] = ContextVar("client", default="")  # whose request the coroutine at hand answers
_current: ContextVar[Work | None] = ContextVar("work", default=None)


class Work:
    """What runs in a thread for a client.

    owner: the client.
    size: characters that were read in the server's own process.
    prompt: the conversation that was read last, its template's variables, and its token ids.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.size = 0
        self.given_up = False
        self.prompt: tuple[Any, Any, list[int]] | None = None
        self._stop: Callable[[], None] | None = None
        self._lock = threading.Lock()

    @staticmethod
    def current() -> Work | None:
        """The work that the running thread does; None: nobody's, such as that of a library."""
        return _current.get()

    def give_up(self) -> None:
        """Nobody waits for it any more; from any thread."""
        with self._lock:
            self.given_up = True
            if self._stop is not None:
                self._stop()

    def stop_with(self, stop: Callable[[], None] | None) -> None:
        """What ends the part of it that runs elsewhere, when it is given up."""
        with self._lock:
            self._stop = stop


class WorkThreads:
    """Threads for work that would hold up the event loop. Of one client, a few at a time run."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="svdengine-prepare")
        self._turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._started: dict[Any, float] = {}

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """The result of a function. When the caller is cancelled, the work is given up."""
        work = Work(client.get())
        turn = self._turns.setdefault(work.owner, asyncio.Semaphore(THREADS_EACH))
        await turn.acquire()
        loop = asyncio.get_running_loop()
        context = copy_context()
        context.run(_current.set, work)
        try:
            future = self._pool.submit(context.run, function, *arguments)
        except BaseException:
            turn.release()
            raise
        self._started[future] = loop.time()
        future.add_done_callback(lambda done: _on_loop(loop, self._ended, done, turn))
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            work.give_up()
            raise

    def waited(self, now: float) -> float:
        """Seconds since the oldest work that is not done was begun, while all threads are busy; 0 while some are not.

        now: the event loop's time.
        """
        return now - min(self._started.values()) if len(self._started) >= THREADS else 0.0

    def close(self) -> None:
        """End the threads, when their work is done."""
        self._pool.shutdown()

    def _ended(self, future: Any, turn: asyncio.Semaphore) -> None:
        self._started.pop(future, None)
        turn.release()


def _on_loop(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: Any) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, *arguments)
