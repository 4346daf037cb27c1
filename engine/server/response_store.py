"""Responses that a later request may go on from, in memory, the oldest forgotten first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from svdengine.server.api_error import ApiError
from svdengine.server.body import encode_json

MAX_RESPONSES = 1000
MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class StoredResponse:
    """A response, and the conversation up to and with it, without instructions."""

    response: dict[str, Any]
    messages: Sequence[dict[str, Any]]
    size: int  # bytes of both as JSON


class ResponseStore:
    """Keeps a bounded number of responses of bounded size; from any thread."""

    def __init__(self, most: int = MAX_RESPONSES, most_bytes: int = MAX_BYTES) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, StoredResponse] = OrderedDict()
        self.size = 0  # bytes

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, response: dict[str, Any], messages: Sequence[dict[str, Any]]) -> None:
        """Keep a response; one that is larger than all that may be kept is not."""
        size = len(encode_json(response)) + len(encode_json(list(messages)))
        if size > self._most_bytes:
            return
        with self._lock:
            self._kept[response["id"]] = StoredResponse(response, messages, size)
            self.size += size
            while len(self._kept) > self._most or self.size > self._most_bytes:
                _, oldest = self._kept.popitem(last=False)
                self.size -= oldest.size

    def get(self, name: str, param: str | None = None) -> StoredResponse:
        """The response of an id. Raises ApiError when there is none, which names `param`."""
        with self._lock:
            found = self._kept.get(name)
        if found is None:
            message = f"the response {name[:100]!r} is not kept here: it was not stored, or forgotten since"
            code = "previous_response_not_found" if param else "response_not_found"
            raise ApiError(400 if param else 404, message, param, code)
        return found

    def remove(self, name: str) -> None:
        """Forget a response. Raises ApiError when there is none."""
        self.get(name)
        with self._lock:
            gone = self._kept.pop(name, None)
            self.size -= gone.size if gone else 0
