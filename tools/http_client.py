"""A small HTTP client on asyncio, which can also misbehave: for load and soak tests of a server on this machine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from svdengine.errors import SvdEngineError


@dataclass(frozen=True)
class Address:
    """Where the server listens, on this machine."""

    port: int
    host: str = "127.0.0.1"


@dataclass(frozen=True)
class Response:
    """What came back; `reader` has the rest of a body that is not read yet."""

    status: int
    headers: dict[str, str]
    reader: asyncio.StreamReader

    async def body(self) -> bytes:
        """The whole body of a response that has its length in the header, or comes in chunks."""
        if "content-length" in self.headers:
            return await self.reader.readexactly(int(self.headers["content-length"]))
        return b"".join([part async for part in self.parts()])

    async def parts(self) -> AsyncIterator[bytes]:
        """The chunks of a chunked body, as they come. Raises SvdEngineError when the body is cut."""
        while True:
            size = int(await self.reader.readline() or b"-1", 16)
            if size < 0:
                raise SvdEngineError("the server cut a body short")
            data = await self.reader.readexactly(size + 2)
            if size == 0:
                return
            yield data[:-2]

    async def events(self) -> AsyncIterator[Any]:
        """The objects of server-sent events, up to [DONE]. Raises SvdEngineError when that does not come."""
        buffer = b""
        async for part in self.parts():
            *lines, buffer = (buffer + part).split(b"\n")
            for line in lines:
                data = line.strip().removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                if data and line.startswith(b"data:"):
                    yield json.loads(data)
        raise SvdEngineError("a stream ended without [DONE]")


@asynccontextmanager
async def connection(address: Address) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection, closed at the end."""
    reader, writer = await asyncio.open_connection(address.host, address.port)
    try:
        yield reader, writer
    finally:
        writer.close()


@asynccontextmanager
async def request(address: Address, path: str, value: Any = None) -> AsyncIterator[Response]:
    """Send a request, a POST where there is a value, on a connection of its own; its response to be read."""
    async with connection(address) as (reader, writer):
        writer.write(head(path, b"" if value is None else encode(value)))
        if value is not None:
            writer.write(encode(value))
        await writer.drain()
        yield await read_head(reader)


def encode(value: Any) -> bytes:
    """The body of a request: bytes as they are, anything else as JSON."""
    return value if isinstance(value, bytes) else json.dumps(value).encode()


def head(path: str, body: bytes, length: int | None = None) -> bytes:
    """The head of a request; `length` is what it says of the body's length, where that is not the truth."""
    method = "POST" if body else "GET"
    size = len(body) if length is None else length
    return (
        f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {size}\r\n\r\n"
    ).encode()


async def read_head(reader: asyncio.StreamReader) -> Response:
    """Status and header fields. Raises SvdEngineError when the server closed the connection."""
    line = (await reader.readline()).split()
    if len(line) < 2:
        raise SvdEngineError("the server closed the connection without an answer")
    headers = {}
    while field := (await reader.readline()).strip():
        name, _, value = field.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip()
    return Response(int(line[1]), headers, reader)
