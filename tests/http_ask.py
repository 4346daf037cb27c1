"""Requests to a live server, made by hand and by OpenAI's client."""

import json
import urllib.error
import urllib.request
from typing import Any

from live_server import LiveServer
from openai import OpenAI
from patience import PATIENCE

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
HELLO: list[Any] = [{"role": "user", "content": "hello world"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}


def ask(
    server: LiveServer, path: str, body: Any = None, method: str | None = None, **headers: str
) -> tuple[int, Any, Any]:
    """Status, body and headers of the answer; the body is read where it is JSON."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(server.url + path, data, names, method=method)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            status, text, found = response.status, response.read(), response.headers
    except urllib.error.HTTPError as error:
        status, text, found = error.code, error.read(), error.headers
    return status, json.loads(text) if found.get_content_type() == "application/json" else text.decode(), found


def client_of(server: LiveServer, key: str = "none") -> OpenAI:
    """OpenAI's own client."""
    return OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE)
