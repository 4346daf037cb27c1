"""Answers in pieces, for as long as the client listens."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterable
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.types import Receive, Scope, Send

from svdengine.scheduling.completion import Completion
from svdengine.server.delivery import Delivery
from svdengine.server.framing import Framing, Object
from svdengine.server.job import Job
from svdengine.server.service import QUIET_SECONDS, Service, completions

T = TypeVar("T")

_SEND_SECONDS = 60.0  # for a client to take what was sent
_HEADERS = [
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would hold back the pieces
]

log = logging.getLogger("svdengine.server")


class EventStream:
    """The ASGI response of a job that was submitted."""

    def __init__(self, service: Service, job: Job, delivery: Delivery) -> None:
        self._service = service
        self._job = job
        self._delivery = delivery

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the pieces until the job is done, or the client goes."""
        await until_disconnected(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        job, framing = self._job, self._job.framing
        headers = [(b"content-type", framing.content_type), *_HEADERS]
        done: dict[int, Completion] = {}
        quiet_until = time.monotonic() + QUIET_SECONDS
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async with aclosing(self._service.updates(job, self._delivery)) as updates:
                await _send_body(send, _joined(framing, job.opening()))
                async for news in updates:
                    done |= completions(news)
                    pieces = [piece for index, update in news.items() for piece in job.pieces(index, update)]
                    # A call that is being written has news all the time, and nothing to tell until it is whole.
                    if pieces or time.monotonic() >= quiet_until:
                        await _send_body(send, _joined(framing, pieces) if pieces else framing.quiet)
                        quiet_until = time.monotonic() + QUIET_SECONDS
            last = job.closing([done[i] for i in range(len(job.requests))])
        except TimeoutError:
            log.info("a client took nothing of its answer for %g seconds", _SEND_SECONDS)
            raise
        except Exception as error:
            last = framing.failure(self._service.error(error))
        await _send_body(send, _joined(framing, last) + framing.end, more=False)


def _joined(framing: Framing, pieces: Iterable[Object]) -> bytes:
    return b"".join(map(framing.piece, pieces))


async def _send_body(send: Send, data: bytes, more: bool = True) -> None:
    """Send a part of the body. Raises TimeoutError when the client does not take it."""
    async with asyncio.timeout(_SEND_SECONDS):
        await send({"type": "http.response.body", "body": data, "more_body": more})


async def until_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """Do the work, which is cancelled when the client goes; None then. Raises what the work raises."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
