"""What a chat job tells, read once for all interfaces: text, calls, and why it ended."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CallPart:
    """A call that begins, or more of the arguments of the one before."""

    arguments: str  # JSON, or a part of it
    id: str | None = None  # None: more of the call before
    name: str = ""


@dataclass(frozen=True)
class Said:
    """A piece of an answer."""

    text: str = ""
    logprobs: Sequence[dict[str, Any]] = ()
    calls: Sequence[CallPart] = ()
    finish_reason: str | None = None


def said_in_piece(piece: dict[str, Any]) -> Said:
    """What a piece of a streamed chat completion says, or one of a plain completion."""
    choice = piece["choices"][0]
    delta = choice.get("delta", choice)
    return _said(delta.get("content") or delta.get("text"), choice, delta.get("tool_calls"))


def said_in_answer(answer: dict[str, Any]) -> Said:
    """What a whole chat completion says, or a plain completion."""
    choice = answer["choices"][0]
    message = choice.get("message", choice)
    return _said(message.get("content") or message.get("text"), choice, message.get("tool_calls"))


def arguments_object(arguments: str) -> dict[str, Any]:
    """Arguments of a call as an object; empty where the answer was cut within them."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _said(text: str | None, choice: dict[str, Any], calls: list[dict[str, Any]] | None) -> Said:
    logprobs = choice.get("logprobs") or {}
    return Said(
        text or "", logprobs.get("content") or (), [_call(each) for each in calls or ()], choice.get("finish_reason")
    )


def _call(call: dict[str, Any]) -> CallPart:
    function = call["function"]
    return CallPart(function.get("arguments") or "", call.get("id"), function.get("name") or "")
