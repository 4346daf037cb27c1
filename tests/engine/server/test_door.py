"""The door before replicas, without Ray: what it passes on, what it refuses, how it tells of a replica that died."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import pytest
from patience import PATIENCE

pytest.importorskip("starlette")
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.types import Message, Scope

from svdengine.server.asgi_messages import answer_messages, plain_scope
from svdengine.server.door import Ask, Door
from svdengine.server.settings import Settings

SETTINGS = Settings("tiny", max_body=1000)
EVENTS = (b"content-type", b"text/event-stream; charset=utf-8")
LINES = (b"content-type", b"application/x-ndjson; charset=utf-8")


class LostError(Exception):
    """What says that a replica died."""


def client_of(ask: Ask) -> TestClient:
    return TestClient(Door(ask, SETTINGS, (LostError,)))


def dying(*messages: Message) -> Ask:
    """A replica that sends these, and then is not there any more."""

    async def ask(scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
        for message in messages:
            yield message
        raise LostError("the actor died")

    return ask


def start(*headers: tuple[bytes, bytes]) -> Message:
    return {"type": "http.response.start", "status": 200, "headers": list(headers)}


def part(body: bytes) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": True}


async def echo(request: Request) -> Response:
    body = await request.body()  # before the answer begins to listen for the client's going

    async def pieces() -> AsyncGenerator[bytes, None]:
        yield request.url.path.encode() + b" " + str(request.query_params).encode() + b" "
        yield body

    return StreamingResponse(pieces(), headers={"x-asked": request.headers["x-ask"]})


def test_a_request_goes_through_and_its_answer_comes_back() -> None:
    app = Starlette(routes=[Route("/{path:path}", echo, methods=["POST"])])

    async def ask(scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
        assert json.loads(json.dumps(scope["path"])) == "/v1/x" and "app" not in scope and "state" not in scope
        async with aclosing(answer_messages(app, scope, body)) as messages:
            async for message in messages:
                yield message

    response = client_of(ask).post("/v1/x?a=1", content=b"hello", headers={"x-ask": "me"})
    assert (response.status_code, response.text, response.headers["x-asked"]) == (200, "/v1/x a=1 hello", "me")


def test_a_body_that_is_too_long_never_reaches_a_replica() -> None:
    response = client_of(dying()).post("/v1/completions", content=b"x" * 1001)
    assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/v1/chat/completions", lambda body: body["error"]["message"]),
        ("/v1/messages", lambda body: body["error"]["message"]),
        ("/api/chat", lambda body: body["error"]),
    ],
)
def test_a_replica_that_dies_before_it_answers_is_an_error_that_says_so(
    path: str, message: Callable[[Any], str]
) -> None:
    response = client_of(dying()).post(path, json={})
    assert response.status_code == 503 and response.headers["retry-after"] == "1"
    assert "has ended; send the request again" in message(response.json())


def test_streams_end_with_an_error_in_the_form_of_their_interface() -> None:
    events = [start(EVENTS), part(b"data: 1\n\n"), part(b"data: 2\n\n")]
    chat = client_of(dying(*events)).post("/v1/chat/completions", json={}).text
    *_, error, done, rest = chat.split("\n\n")
    assert chat.startswith("data: 1\n\ndata: 2\n\n") and (done, rest) == ("data: [DONE]", "")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "replica_lost"

    name, data = client_of(dying(*events)).post("/v1/messages", json={}).text.split("\n\n")[2].split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["type"] == "overloaded_error"

    name, data = client_of(dying(*events)).post("/v1/responses", json={}).text.split("\n\n")[2].split("\n")
    assert name == "event: error"
    told = json.loads(data.removeprefix("data: "))
    assert (told["type"], told["code"], told["sequence_number"]) == ("error", "replica_lost", 2)

    lines = client_of(dying(start(LINES), part(b'{"a": 1}\n'))).post("/api/chat", json={}).text.splitlines()
    assert "has ended" in json.loads(lines[1])["error"]


def test_what_cannot_be_told_is_cut() -> None:
    with pytest.raises(LostError):
        client_of(dying(start((b"content-type", b"application/json")), part(b'{"id":'))).post("/v1/completions")


def test_a_stream_that_had_ended_is_left_as_it_is() -> None:
    whole = {"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False}
    assert client_of(dying(start(EVENTS), whole)).post("/v1/completions").text == "data: [DONE]\n\n"


def test_another_error_is_not_taken_for_a_death() -> None:
    async def ask(scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
        raise ValueError("a fault")
        yield {}

    with pytest.raises(ValueError, match="a fault"):
        client_of(ask).post("/v1/completions")


def test_a_client_that_goes_ends_the_answer() -> None:
    ended = asyncio.Event()

    async def endless(scope: Scope, receive: Any, send: Any) -> None:
        await send(start(EVENTS))
        try:
            while (await receive())["type"] != "http.disconnect":
                pass
        finally:
            ended.set()

    async def ask(scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
        async with aclosing(answer_messages(endless, scope, body)) as messages:
            async for message in messages:
                yield message

    async def leave() -> None:
        sent: list[Message] = []
        news: asyncio.Queue[Message] = asyncio.Queue()
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}

        async def send(message: Message) -> None:
            sent.append(message)
            await news.put({"type": "http.disconnect"})

        await news.put({"type": "http.request", "body": b"{}", "more_body": False})
        await Door(ask, SETTINGS, (LostError,))(scope, news.get, send)
        assert sent == [start(EVENTS)]
        await asyncio.wait_for(ended.wait(), PATIENCE)

    asyncio.run(leave())


def test_an_application_that_fails_is_heard() -> None:
    async def failing(scope: Scope, receive: Any, send: Any) -> None:
        await send(start())
        raise ValueError("a fault")

    async def ask() -> list[Message]:
        return [message async for message in answer_messages(failing, plain_scope({"type": "http", "app": 1}), b"")]

    with pytest.raises(ValueError, match="a fault"):
        asyncio.run(ask())
