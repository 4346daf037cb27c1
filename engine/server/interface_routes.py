"""Routes of the interfaces beside chat completions: OpenAI's responses, Anthropic's, Ollama's, and their document."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from svdengine.server.api_error import ApiError
from svdengine.server.body import encode_json
from svdengine.server.messages_api import MessagesJob, count_tokens
from svdengine.server.ollama_api import OllamaJob
from svdengine.server.ollama_models import show, tags, version
from svdengine.server.openapi import document
from svdengine.server.response_store import ResponseStore
from svdengine.server.responses_api import ResponsesJob
from svdengine.server.service import Service

Run = Callable[[Request, Any], Awaitable[Any]]


class InterfaceRoutes:
    """Their endpoints."""

    def __init__(self, service: Service, run: Run, body: Callable[[Request], Awaitable[Any]]) -> None:
        """`run` answers a request by a job that is made of its body; `body` reads one."""
        self._service = service
        self._run = run
        self._body = body
        self._responses = ResponseStore()
        self._document: bytes | None = None

    def paths(self) -> list[tuple[str, str, Callable[[Request], Any]]]:
        """Path, method and endpoint."""
        return [
            ("/v1/responses", "POST", self.create_response),
            ("/v1/responses/{id}", "GET", self.response),
            ("/v1/responses/{id}", "DELETE", self.delete_response),
            ("/v1/messages", "POST", self.create_message),
            ("/v1/messages/count_tokens", "POST", self.count_tokens),
            ("/api/chat", "POST", self.ollama_chat),
            ("/api/generate", "POST", self.ollama_generate),
            ("/api/tags", "GET", self.ollama_tags),
            ("/api/show", "POST", self.ollama_show),
            ("/api/version", "GET", self.ollama_version),
            ("/openapi.json", "GET", self.openapi),
        ]

    async def create_response(self, request: Request) -> Any:
        """Answer by OpenAI's later interface."""
        return await self._run(request, partial(ResponsesJob, store=self._responses))

    async def response(self, request: Request) -> Any:
        """A response that is kept."""
        if request.query_params.get("stream", "false") != "false":
            raise ApiError(
                400, "stream is not supported for a response that is kept", "stream", "unsupported_parameter"
            )
        return _json(self._responses.get(request.path_params["id"]).response)

    async def delete_response(self, request: Request) -> Any:
        """Forget a response."""
        name = request.path_params["id"]
        self._responses.remove(name)
        return _json({"id": name, "object": "response", "deleted": True})

    async def create_message(self, request: Request) -> Any:
        """Answer by Anthropic's interface."""
        return await self._run(request, MessagesJob)

    async def count_tokens(self, request: Request) -> Any:
        """How long the prompt of a message would be."""
        return await self._told(request, count_tokens)

    async def ollama_chat(self, request: Request) -> Any:
        """Answer a conversation by Ollama's interface."""
        return await self._run(request, partial(OllamaJob, chat=True))

    async def ollama_generate(self, request: Request) -> Any:
        """Answer a prompt by Ollama's interface."""
        return await self._run(request, partial(OllamaJob, chat=False))

    async def ollama_tags(self, _: Request) -> Any:
        """The one model, for Ollama's clients."""
        return _json(tags(self._service.llm, self._service.settings.name))

    async def ollama_show(self, request: Request) -> Any:
        """More about it."""
        return await self._told(request, show)

    async def ollama_version(self, _: Request) -> Any:
        """Which Ollama this is like."""
        return _json(version())

    async def openapi(self, _: Request) -> Any:
        """The document of all interfaces."""
        if self._document is None:
            found = await self._service.in_thread(document, self._service.llm, self._service.settings.name)
            self._document = encode_json(found)
        return Response(self._document, media_type="application/json")

    async def _told(self, request: Request, function: Callable[..., Any]) -> Any:
        """What a function makes of a body, in a thread."""
        service = self._service
        value = await self._body(request)
        return _json(await service.in_thread(function, service.llm, service.settings.name, value))


def _json(value: Any) -> Response:
    return Response(encode_json(value), media_type="application/json")
