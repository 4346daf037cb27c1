"""The body of a request: read, parsed, its fields taken one by one, and what is left over refused by name."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, TypeVar, overload

from svdengine.server.api_error import ApiError, unsupported
from svdengine.server.settings import Settings

if TYPE_CHECKING:
    from starlette.requests import Request

T = TypeVar("T")

_DISCARD = 16  # times the body limit is read and thrown away, so that the client can read why it was refused

MAX_VALUES = 1_000_000  # of one body: reading more would hold up all others

_LONG_NUMBER = re.compile(rb"[0-9]{19}|[0-9][eE]")  # where there is none, no number needs a look
_INTEGERS = range(-(1 << 63), 1 << 64)

_KINDS: dict[type, str] = {
    str: "a string",
    bool: "true or false",
    int: "a whole number",
    list: "a list",
    dict: "an object",
}
_JSON_TYPES: dict[type, str] = {str: "string", bool: "boolean", int: "integer", list: "array", dict: "object"}


async def read_body(request: Request, settings: Settings) -> bytes:
    """The body of a request. Raises ApiError when it is too long or comes too slowly, ClientDisconnect."""
    data, size = bytearray(), 0
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for part in request.stream():
                size += len(part)
                if size <= settings.max_body:
                    data += part
                elif size > _DISCARD * settings.max_body:
                    break
    except TimeoutError:
        message = f"the body did not arrive within {settings.body_seconds:g} seconds"
        raise ApiError(408, message, headers={"connection": "close"}) from None
    if size > settings.max_body:
        message = f"the body has more than {settings.max_body} bytes, the limit of this server"
        raise ApiError(413, message, code="body_too_large", headers={"connection": "close"})
    return bytes(data)


def parse_json(data: bytes) -> Any:
    """A JSON value. Raises ApiError when it is none, nested too deep, or too large, or holds a number beyond 64 bits.

    Every number of a request comes through here, so that whoever takes one knows that it fits.
    """
    if sum(map(data.count, b",[{")) > MAX_VALUES:
        raise ApiError(400, f"the body has more than {MAX_VALUES} commas and brackets", code="body_too_large")
    numbers: dict[str, Any] = {"parse_float": _float, "parse_int": _integer} if _LONG_NUMBER.search(data) else {}
    try:
        return json.loads(data, parse_constant=_refuse_constant, **numbers)
    except RecursionError:
        raise ApiError(400, "the body is nested too deep") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}") from None


def encode_json(value: Any) -> bytes:
    """JSON as UTF-8, on one line."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


class NotedFields(dict[str, Any]):
    """A body that notes what its reader asks for, so that the reader itself can say what a body may hold."""

    def __init__(self, value: dict[str, Any]) -> None:
        super().__init__(value)
        self.schemas: dict[str, dict[str, Any]] = {}  # of each field, as far as the reader states it
        self.required: list[str] = []


class Body:
    """A JSON object. Null stands for a field that is not given."""

    def __init__(self, value: Any) -> None:
        if not isinstance(value, dict):
            raise ApiError(400, f"the body must be a JSON object, found {_kind(value)}")
        self._notes = value if isinstance(value, NotedFields) else None
        self._fields = {name: item for name, item in value.items() if item is not None}

    @overload
    def take(self, name: str, kind: type[T]) -> T | None: ...

    @overload
    def take(self, name: str, kind: type[T], default: T) -> T: ...

    def take(self, name: str, kind: type[T], default: T | None = None) -> T | None:
        """A field of one kind. Raises ApiError when it is of another."""
        self._note(name, {"type": _JSON_TYPES[kind]})
        value = self._fields.pop(name, None)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ApiError(400, f"{name} must be {_KINDS[kind]}, found {_kind(value)}", name)
        return value

    def take_any(self, name: str) -> Any:
        """A field of any kind, or None; whoever gets it checks it."""
        self._note(name, {})
        return self._fields.pop(name, None)

    def need(self, name: str, kind: type[T]) -> T:
        """The same for a field that must be there."""
        value = self.take(name, kind)
        if self._notes is not None:
            self._notes.required.append(name)
        if value is None:
            raise ApiError(400, f"{name} is missing", name, "missing_required_parameter")
        return value

    def ignore(self, *names: str) -> None:
        """Drop fields that change nothing here."""
        for name in names:
            self._note(name, {})
            self._fields.pop(name, None)

    def only(self, name: str, *values: Any) -> None:
        """Drop a field that may have these values, which change nothing. Raises ApiError when it has another."""
        self._note(name, {"enum": list(values)})
        value = self._fields.pop(name, None)
        if value is not None and value not in values:
            raise unsupported(name, f" but as {' or '.join(map(json.dumps, values))}")

    def finish(self, known: Collection[str] = ()) -> None:
        """Raise ApiError when a field is left. `known`: fields that exist in OpenAI's interface, but not here."""
        for name in self._fields:
            if name in known:
                raise unsupported(name)
            raise ApiError(400, f"{name[:100]!r} is not a field of this request", name[:100], "unknown_parameter")

    def _note(self, name: str, schema: dict[str, Any]) -> None:
        if self._notes is not None:
            self._notes.schemas[name] = schema


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return next((text for kind, text in _KINDS.items() if type(value) is kind), "a number")


def _integer(text: str) -> int:
    if len(text) > len(str(_INTEGERS.start)) or (value := int(text)) not in _INTEGERS:
        raise ApiError(400, f"the number {text:.40} is beyond 64 bits", code="invalid_value")
    return value


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ApiError(400, f"the number {text:.40} is beyond 64 bits", code="invalid_value")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")
