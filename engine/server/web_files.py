"""The chat page: a few files of this package, which load nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

# Path -> file of the folder web, and its type.
WEB_FILES = {
    "/": ("index.html", "text/html"),
    "/chat.css": ("chat.css", "text/css"),
    "/chat.js": ("chat.js", "text/javascript"),
    "/markdown.js": ("markdown.js", "text/javascript"),
}

_HEADERS = {
    # What a model writes could not load or run anything, were it ever taken for HTML.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def web_routes() -> list[Route]:
    """Routes of the files, which are read once."""
    return [Route(path, _endpoint(name, kind), methods=["GET"]) for path, (name, kind) in WEB_FILES.items()]


def _endpoint(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    content = (files("svdengine.server") / "web" / name).read_bytes()

    async def endpoint(_: Request) -> Response:
        return Response(content, headers=_HEADERS, media_type=kind)

    return endpoint
