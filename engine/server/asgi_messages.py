"""Requests and answers of ASGI as plain values, which may go from one process to another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from starlette.types import ASGIApp, Message, Scope

_PLAIN = (  # of a scope; what servers put there besides belongs to their own process
    *("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path"),
    *("headers", "client", "server"),
)


def plain_scope(scope: Scope) -> Scope:
    """What describes a request, without what belongs to the process that received it."""
    return {name: scope[name] for name in _PLAIN if name in scope}


async def answer_messages(app: ASGIApp, scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
    """Have an application answer a request with this whole body, and give what it sends.

    Ending the generator early tells the application that the client went. Raises what the application raises.
    """
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    unread = [{"type": "http.request", "body": body, "more_body": False}]
    gone = asyncio.Event()

    async def receive() -> Message:
        if unread:
            return unread.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    task = asyncio.ensure_future(app(scope, receive, sent.put))
    task.add_done_callback(lambda _: sent.put_nowait(None))
    try:
        while (message := await sent.get()) is not None:
            yield message
        await task
    finally:
        gone.set()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
