"""Connections of clients: how many there may be, and how long one may take to say what it wants."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

from svdengine.server.api_error import ApiError
from svdengine.server.body import encode_json
from svdengine.server.settings import Settings

_BODY = encode_json(ApiError(503, "too many connections; try again later", code="too_many_connections").body)
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(_BODY), _BODY)
)


class Connections:
    """Those that are open, and of them those that have no request at hand: they give way when there are too many."""

    def __init__(self, settings: Settings) -> None:
        self.head_seconds = settings.head_seconds
        self._most = settings.max_connections
        self._most_each = settings.address_connections
        self._idle: dict[Connection, None] = {}  # since longest first
        self._open: Counter[str] = Counter()  # by address

    @property
    def count(self) -> int:
        """How many are open."""
        return self._open.total()

    def limit(self, most: int) -> None:
        """Allow no more than so many, whatever the settings say."""
        self._most = min(self._most, most)

    def admit(self, connection: Connection) -> bool:
        """Count one in, for which another may have to go. False when all others are busy."""
        address = connection.address
        if self._open[address] >= self._most_each and not self._cut(c for c in self._idle if c.address == address):
            return False
        if self.count >= self._most and not self._cut(self._idle):
            return False
        self._open[address] += 1
        return True

    def leave(self, connection: Connection) -> None:
        """Count one out."""
        self._idle.pop(connection, None)
        self._open[connection.address] -= 1
        if not self._open[connection.address]:
            del self._open[connection.address]

    def note(self, connection: Connection, busy: bool) -> None:
        """Take note of whether one has a request at hand."""
        if busy:
            self._idle.pop(connection, None)
        else:
            self._idle.setdefault(connection)

    def _cut(self, candidates: Iterable[Connection]) -> bool:
        oldest = next(iter(candidates), None)
        if oldest is None:
            return False
        self.leave(oldest)
        oldest.cut()
        return True


class Connection(H11Protocol):
    """One connection. Its client has `head_seconds` to send the head of a request, from its first byte or the start."""

    all: ClassVar[Connections]
    address = ""
    _counted = False
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, or tell the client that there are too many."""
        super().connection_made(transport)
        self.address = self.client[0] if self.client else ""
        self._counted = self.all.admit(self)
        if not self._counted:
            transport.write(_FULL)
            transport.close()
            return
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """Free its place."""
        self._end_timer()
        self._uncount()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read what came."""
        if not self._counted:
            return
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        """An answer was sent; uvicorn waits for the next request from now on."""
        super().on_response_complete()
        if self._counted:
            self.all.note(self, self._busy)

    def cut(self) -> None:
        """End it at once; its place was given to another."""
        self._counted = False
        self._end_timer()
        self.transport.abort()

    @property
    def _busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _look(self) -> None:
        """Have a client that owes the rest of a head, or of a body that was answered already, be cut in time."""
        if self._busy:
            self._end_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.all.head_seconds, self._overdue)
        self.all.note(self, self._busy)

    def _overdue(self) -> None:
        self._head_timer = None
        if not self._busy:
            self.transport.abort()

    def _end_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _uncount(self) -> None:
        if self._counted:
            self._counted = False
            self.all.leave(self)


def connection_class(connections: Connections) -> type[Connection]:
    """The protocol for uvicorn, whose connections these are."""
    fields: dict[str, Any] = {"all": connections}
    return type("CountedConnection", (Connection,), fields)
