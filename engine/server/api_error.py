"""Errors in the shape that OpenAI's clients read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from svdengine.errors import (
    ContextOverflowError,
    ModelFileError,
    QueueFullError,
    RequestError,
    ShutdownError,
    SvdEngineError,
)


@dataclass
class ApiError(Exception):
    """What a client is told, with its HTTP status."""

    status: int
    message: str
    param: str | None = None  # the field of the body that is at fault
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def unsupported(name: str, what: str = "") -> ApiError:
    """A field, or a value of one, that is known and not supported."""
    return ApiError(400, f"{name} is not supported{what}", name, "unsupported_parameter")


def context_overflow(error: ContextOverflowError, field: str) -> ApiError:
    """How a prompt that is too long is told; `field` of the body holds it."""
    return ApiError(400, str(error), field, "context_length_exceeded")


def api_error(error: BaseException, retry_after: int = 1) -> ApiError:
    """How an error of the engine is told. `retry_after`: seconds after which a full queue is worth another try."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextOverflowError):
        return context_overflow(error, "messages")
    if isinstance(error, RequestError | ModelFileError):  # what a request asks for, and this model cannot do
        return ApiError(400, str(error))
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full", headers={"retry-after": str(retry_after)})
    if isinstance(error, ShutdownError):
        return ApiError(503, str(error), code="shutting_down", headers={"retry-after": "10"})
    if isinstance(error, SvdEngineError):
        return ApiError(500, str(error), code="engine_error")
    return ApiError(500, "the server failed on this request; its log says more", code="internal_error")
