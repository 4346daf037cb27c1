"""The text of completions for coroutines: a thread takes the model's steps while any of them waits for text."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Protocol, Self

from svdengine.errors import RequestError
from svdengine.scheduling.completion import Completion
from svdengine.scheduling.request import Generation

if TYPE_CHECKING:
    import asyncio


class Stepper(Protocol):
    """What is needed of a model. All of it may be called from any thread, and waits for a step that runs."""

    def add(self, request: Generation) -> None:
        """Queue a request."""
        ...

    def step(self) -> None:
        """Advance all requests."""
        ...

    def abort(self, request: Generation) -> None:
        """Take out a request."""
        ...


class StepThread:
    """Takes steps while there are requests of coroutines, and wakes those that wait. It ends when there are none.

    It knows no model but while it runs, so that it keeps none alive.
    """

    def __init__(self) -> None:
        self._changed = threading.Lock()  # guards what is below
        self._new: deque[Generation] = deque()
        self._listeners: dict[Generation, Callable[[], None]] = {}
        self._running = False
        self._unwanted: deque[Generation] = deque()  # a deque needs no lock, which the collector could not wait for

    def run(self, model: Stepper, request: Generation, listener: Callable[[], None]) -> None:
        """Run a request, and call `listener`, on another thread, after each step and when it is done."""
        with self._changed:
            self._new.append(request)
            self._listeners[request] = listener
            if not self._running:
                self._running = True
                threading.Thread(target=self._work, args=(model,), name="svdengine-async", daemon=True).start()

    def end(self, request: Generation) -> None:
        """Have a request taken out before the next step. The collector may call this."""
        self._unwanted.append(request)

    def _work(self, model: Stepper) -> None:
        while self._begin(model):
            try:
                model.step()
            except Exception as error:
                self._fail(error)
            self._tell()

    def _begin(self, model: Stepper) -> bool:
        """Add what is new and take out what nobody wants; false when there is nothing left to do."""
        with self._changed:
            new = list(self._new)
            self._new.clear()
            self._running = bool(self._listeners)
            running = self._running
        for request in new:
            try:
                model.add(request)
            except Exception as error:
                request.error = error
        while self._unwanted:
            model.abort(self._unwanted.popleft())
        return running

    def _fail(self, error: Exception) -> None:
        """A step that raises ends all requests that were added; here it is made sure of."""
        with self._changed:
            for request in self._listeners.keys() - set(self._new):
                if not request.done:
                    request.error = error

    def _tell(self) -> None:
        with self._changed:
            told = list(self._listeners.items())
            for request, _ in told:
                if request.done:
                    del self._listeners[request]
        for request, listener in told:
            try:
                listener()
            except RuntimeError:  # its event loop was closed
                self.end(request)


class AsyncTextStream(AsyncIterator[str]):
    """An asynchronous iterator over pieces of text, for one task of one event loop. Generation begins with the first.

    Cancelling the task that waits for a piece, closing the stream, or dropping it, ends generation and frees its KV
    blocks.
    """

    def __init__(self, model: Stepper, thread: StepThread, prepare: Callable[[], Generation]) -> None:
        """`prepare` makes the request; it runs on another thread, since a long prompt takes a while."""
        import asyncio  # here, since most programs have no coroutines and start sooner

        self._model = model
        self._thread = thread
        self._prepare = prepare
        self._request: Generation | None = None
        self._news = asyncio.Event()
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        try:
            request = await self.begin()
            while request is not None and not (request.pieces or request.done):
                self._news.clear()
                if not (request.pieces or request.done):  # or they came just before that
                    await self._news.wait()
        except BaseException:
            await self.aclose()
            raise
        if request is None:
            raise StopAsyncIteration
        if request.pieces:
            return request.pieces.popleft()
        if request.error is not None:
            raise request.error
        raise StopAsyncIteration

    async def begin(self) -> Generation | None:
        """Begin generation, where it has not begun; None: the stream was closed before."""
        if self._request is None and not self._closed:
            import asyncio

            request = await asyncio.to_thread(self._prepare)
            self._request = request
            self._thread.run(self._model, request, _waker(asyncio.get_running_loop(), self._news))
        return self._request

    @property
    def completion(self) -> Completion:
        """What was generated so far; all of it after the last piece. Raises RequestError before the first."""
        if self._request is None:
            raise RequestError("generation begins with the first piece; there is no completion yet")
        return self._request.completion()

    async def aclose(self) -> None:
        """End generation, and wait until its KV blocks are free; text that was not fetched yet can still be."""
        self._closed = True
        if self._request is None or self._request.done:
            return
        self._thread.end(self._request)
        while not self._request.done:
            self._news.clear()
            if not self._request.done:
                await self._news.wait()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        request = getattr(self, "_request", None)
        if request is not None and not request.done:
            self._thread.end(request)


def _waker(loop: asyncio.AbstractEventLoop, news: asyncio.Event) -> Callable[[], None]:
    """It knows the event and not the stream, which can be dropped while its request runs."""

    def wake() -> None:
        loop.call_soon_threadsafe(news.set)

    return wake


async def collect(streams: Sequence[AsyncTextStream]) -> list[Completion]:
    """Run streams together; their completions, in the same order. An error of one ends them all."""
    try:
        for stream in streams:
            await stream.begin()
        for stream in streams:
            async for _ in stream:
                pass
    finally:
        for stream in streams:
            await stream.aclose()
    return [stream.completion for stream in streams]
