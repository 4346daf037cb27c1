"""The chat page: a few files of this package, which load nothing from elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "woff2": "font/woff2", "txt": "text/plain"}

_HEADERS = {
    # What a model writes could not load or run anything, were it ever taken for HTML.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def _found(folder: Traversable, path: str = "/") -> Iterator[tuple[str, Traversable]]:
    """Path on the server and file, of all in a folder that browsers may load."""
    for entry in sorted(folder.iterdir(), key=lambda each: each.name):
        if entry.is_dir():
            yield from _found(entry, f"{path}{entry.name}/")
        elif entry.name.rpartition(".")[2] in _TYPES:
            yield ("/" if entry.name == "index.html" else path + entry.name), entry


# Path -> file of the folder web.
WEB_FILES: Mapping[str, Traversable] = dict(_found(files("svdengine.server") / "web"))


def web_routes() -> list[Route]:
    """Routes of the files, which are read once."""
    return [Route(path, _endpoint(file), methods=["GET"]) for path, file in WEB_FILES.items()]


def _endpoint(file: Traversable) -> Callable[[Request], Awaitable[Response]]:
    content, kind = file.read_bytes(), _TYPES[file.name.rpartition(".")[2]]
    tag = f'"{hashlib.blake2b(content, digest_size=12).hexdigest()}"'
    headers = {**_HEADERS, "etag": tag}

    async def endpoint(request: Request) -> Response:
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=kind)

    return endpoint
