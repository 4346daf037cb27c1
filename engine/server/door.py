"""What stands before replicas: passes requests on to them, and explains it when one ends while it answers.

A replica that dies takes its answers along, and whatever carries its messages can only cut them. The door lives on in
a process of its own, so that clients read an error in the form of the interface that they speak. It sends nothing a
second time: what made one replica end could end the next.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from svdengine.server.api_error import ApiError
from svdengine.server.asgi_messages import plain_scope
from svdengine.server.body import read_body
from svdengine.server.error_form import anthropic_error, error_body, ollama_error
from svdengine.server.event_stream import until_disconnected
from svdengine.server.framing import DATA_EVENTS, EVENTS, LINES, line, named_event
from svdengine.server.settings import Settings

log = logging.getLogger("svdengine.server")

Ask = Callable[[Scope, bytes], AsyncGenerator[Message, None]]  # a scope and a body -> what a replica answers


class Door:
    """An ASGI application. `ask` has a replica answer; `lost` are the errors that say that it ended meanwhile."""

    def __init__(self, ask: Ask, settings: Settings, lost: tuple[type[BaseException], ...]) -> None:
        self._ask = ask
        self._settings = settings
        self._lost = lost

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["type"] == "http":
            try:
                body = await read_body(Request(scope, receive), self._settings)
            except ApiError as error:
                await _refuse(error, scope, receive, send)
            except ClientDisconnect:
                pass
            else:
                await until_disconnected(receive, self._pass_on(scope, body, receive, send))

    async def _pass_on(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        kind, events, ended = None, 0, False
        try:
            async with aclosing(self._ask(plain_scope(scope), body)) as answer:
                async for message in answer:
                    if message["type"] == "http.response.start":
                        kind = dict(message["headers"]).get(b"content-type", b"")
                    else:
                        events += message.get("body", b"").count(b"\n\n")
                        ended = not message.get("more_body", False)
                    await send(message)
        except self._lost as error:
            log.warning("a replica ended while it answered %s: %s", scope["path"], type(error).__name__)
            told = _lost_replica()
            if kind is None:
                await _refuse(told, scope, receive, send)
            elif kind not in (EVENTS, LINES):
                raise  # a part of a JSON object was sent, perhaps: only the connection can tell
            elif not ended:
                last = _last_piece(scope["path"], told, events)
                await send({"type": "http.response.body", "body": last, "more_body": False})


def _lost_replica() -> ApiError:
    message = "the process that was answering has ended; send the request again, and another one answers"
    return ApiError(503, message, code="replica_lost", headers={"retry-after": "1"})


def _last_piece(path: str, told: ApiError, events: int) -> bytes:
    """The end of a stream of which `events` were sent, as the interface has errors."""
    if path.startswith("/api/"):
        return line(ollama_error(told))
    if path.startswith("/v1/messages"):
        return named_event(anthropic_error(told))
    if path.startswith("/v1/responses"):
        about = {"code": told.code, "message": told.message, "param": None}
        return named_event({"type": "error", "sequence_number": events, **about})
    return DATA_EVENTS.piece(told.body) + DATA_EVENTS.end


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    response = JSONResponse(error_body(scope["path"], error), error.status, dict(error.headers))
    await response(scope, receive, send)


async def _live(receive: Receive, send: Send) -> None:
    """Say that there is nothing to begin and nothing to end."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
