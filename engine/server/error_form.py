"""Errors in the form of the interface that was asked, which its path tells, in its own words for the fields."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from svdengine.errors import RequestError
from svdengine.server.api_error import ApiError, api_error

_ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(path: str, told: ApiError) -> dict[str, Any]:
    """The JSON of an error: OpenAI's, but for the paths of other interfaces."""
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return anthropic_error(told)
    if path.startswith("/api/"):
        return ollama_error(told)
    return told.body


def anthropic_error(told: ApiError) -> dict[str, Any]:
    """As Anthropic's clients read it."""
    kind = _ANTHROPIC_KINDS.get(told.status, "invalid_request_error" if told.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": told.message}}


def ollama_error(told: ApiError) -> dict[str, Any]:
    """As Ollama's clients read it."""
    return {"error": told.message}


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Errors of the chat job about the body that an interface made for it name that interface's fields.

    names: field of the chat job -> what it is called here.
    """
    try:
        yield
    except (ApiError, RequestError) as error:
        told = api_error(error)
        pattern = rf"(?<![\w.])({'|'.join(map(re.escape, names))})(?!\w)"
        told.message = re.sub(pattern, lambda match: names[match[1]], told.message, count=1)
        if told.param is not None:
            told.param = re.sub(pattern, lambda match: names[match[1]], told.param, count=1)
        raise told from error
