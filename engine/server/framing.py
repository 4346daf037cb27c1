"""How the pieces of an answer follow each other on the wire."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from svdengine.server.api_error import ApiError
from svdengine.server.body import encode_json

Object = dict[str, Any]  # of JSON

EVENTS = b"text/event-stream; charset=utf-8"
LINES = b"application/x-ndjson; charset=utf-8"


@dataclass(frozen=True)
class Framing:
    """A manner of streaming."""

    content_type: bytes
    piece: Callable[[Object], bytes]
    failure: Callable[[ApiError], list[Object]]  # the last pieces, when an error ends the answer
    quiet: bytes = b": still at work\n\n"  # shows that the server is alive
    end: bytes = b""


def data_event(piece: Object) -> bytes:
    """A server-sent event without a name."""
    return b"data: " + encode_json(piece) + b"\n\n"


def named_event(piece: Object) -> bytes:
    """A server-sent event that is named by its type."""
    return b"event: " + str(piece["type"]).encode() + b"\n" + data_event(piece)


def line(piece: Object) -> bytes:
    """A line of JSON."""
    return encode_json(piece) + b"\n"


# That of chat completions and completions.
DATA_EVENTS = Framing(EVENTS, data_event, lambda told: [told.body], end=b"data: [DONE]\n\n")
