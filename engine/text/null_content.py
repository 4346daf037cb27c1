"""Messages without a text, as OpenAI's clients write them beside tool calls: {"content": null, "tool_calls": [...]}.

Most templates take it for granted that there is a text: they add it to others, or print it, as "None". Some ask
whether there is one and write calls only where there is none. The first get an empty text, the others what was given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_ASKS = re.compile(r"""content['"\]) ]*\s(is(\s+not)?|==|!=)\s+none\b""", re.IGNORECASE)


def with_content(messages: Sequence[Mapping[str, Any]], template: str) -> list[dict[str, Any]]:
    """The messages, as a template with this source can read them."""
    asks = _ASKS.search(template) is not None
    return [_told(message) if asks else _filled(message) for message in messages]


def _filled(message: Mapping[str, Any]) -> dict[str, Any]:
    return {**message, "content": ""} if message.get("content") is None else dict(message)


def _told(message: Mapping[str, Any]) -> dict[str, Any]:
    return {"content": None, **message}
