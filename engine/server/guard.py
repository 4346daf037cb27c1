"""Who may use the server: API keys, and web pages that are shown in a browser on this machine."""

from __future__ import annotations

import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from svdengine.server.api_error import ApiError
from svdengine.server.settings import Settings, is_loopback
from svdengine.server.web_files import WEB_FILES

# The chat page asks for a key itself, and monitors need none to see that the server is alive.
_OPEN_PATHS = frozenset([*WEB_FILES, "/health"])


class Guard:
    """ASGI middleware that answers requests of those who may not use the server."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._keys = [key.encode() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        error = self._error(scope["path"], Headers(scope=scope)) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            await JSONResponse(error.body, error.status, dict(error.headers))(scope, receive, send)

    def _error(self, path: str, headers: Headers) -> ApiError | None:
        host = headers.get("host", "")
        if self._settings.loopback and not self._keys and not is_loopback(_host_name(host)):
            # Any web page can have its own name resolve to this machine.
            return ApiError(403, f"a server without API keys answers to this machine's own names, not {host[:200]!r}")
        origin = headers.get("origin")
        if origin is not None and not self._allowed_origin(origin, host):
            return ApiError(403, f"web pages of {origin[:200]!r} may not use this server; see --cors-origin")
        if self._keys and path not in _OPEN_PATHS and not self._has_key(headers):
            challenge = {"www-authenticate": "Bearer"}
            return ApiError(401, "a valid API key is missing", code="invalid_api_key", headers=challenge)
        return None

    def _allowed_origin(self, origin: str, host: str) -> bool:
        allowed = self._settings.cors_origins
        return "*" in allowed or origin in allowed or urlsplit(origin).netloc == host

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        given = given if scheme.lower() == "bearer" else headers.get("x-api-key", "")  # as Anthropic's clients send it
        sent = given.strip().encode("utf-8", "replace")
        # Every key is compared, in constant time, so that timing tells nothing.
        matches = [hmac.compare_digest(key, sent) for key in self._keys]
        return any(matches)


def _host_name(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host
