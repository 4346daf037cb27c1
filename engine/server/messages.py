"""The messages of a chat request, as chat templates expect them."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from svdengine.server.api_error import ApiError, unsupported

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_REFUSED = ("audio", "function_call")
_READ = ("role", "content", "tool_calls", "refusal", "annotations", *_REFUSED)


def read_messages(messages: list[Any]) -> list[dict[str, Any]]:
    """Messages with plain text contents. Raises ApiError, which says where."""
    if not messages:
        raise ApiError(400, "messages is empty", "messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ApiError(400, f"{where} must be an object", where)
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise ApiError(400, f"{where}.role must be one of {', '.join(_ROLES)}, found {role!r:.100}", f"{where}.role")
    calls = message.get("tool_calls")
    content = message.get("content")
    if content is None and not calls and role != "assistant":
        raise ApiError(400, f"{where} has no content", f"{where}.content")
    for name in _REFUSED:
        if message.get(name) is not None:
            raise unsupported(f"{where}.{name}")
    # Whatever else a client sends, such as reasoning_content, is for the template to read or to leave.
    read: dict[str, Any] = {k: v for k, v in message.items() if k not in _READ and v is not None}
    read |= {"role": _ROLES[role], "content": _text(content, f"{where}.content")}
    if isinstance(read.get("reasoning"), str):  # what newer clients call it
        read.setdefault("reasoning_content", read["reasoning"])
    if calls:
        read["tool_calls"] = _tool_calls(calls, f"{where}.tool_calls")
    return read


def _text(content: Any, where: str) -> str:
    if content is None:
        return ""  # beside tool calls, or of an assistant that said nothing
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(400, f"{where} must be a string or a list of parts", where)
    return "\n".join(_part(part, f"{where}[{i}]") for i, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise ApiError(400, f"{where} must be an object with a type", where)
    if part["type"] not in ("text", "refusal"):
        raise unsupported(f"{where}.type", f" as {part['type']!r:.100}; this model reads text only")
    text = part.get(part["type"])
    if not isinstance(text, str):
        raise ApiError(400, f"{where}.{part['type']} must be a string", where)
    return text


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise ApiError(400, f"{where} must be a list", where)
    return [_tool_call(call, f"{where}[{i}]") for i, call in enumerate(calls)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ApiError(400, f"{where} must have a function with a name", where)
    arguments = function.get("arguments", "{}")
    if isinstance(arguments, str):  # templates print the object, or what a model wrote in place of one
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments or "{}", parse_constant=_refuse)
    return {"id": call.get("id"), "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
