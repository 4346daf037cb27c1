"""The HTTP routes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from svdengine import __version__
from svdengine.llm import LLM
from svdengine.scheduling.completion import Completion
from svdengine.server import metrics
from svdengine.server.api_error import ApiError
from svdengine.server.body import encode_json, parse_json, read_body
from svdengine.server.bounded_text import BoundedTokenizer
from svdengine.server.chat_job import ChatJob
from svdengine.server.completion_job import CompletionJob
from svdengine.server.embedding_routes import EmbeddingRoutes
from svdengine.server.error_form import error_body
from svdengine.server.event_stream import EventStream, until_disconnected
from svdengine.server.guard import Guard
from svdengine.server.interface_routes import InterfaceRoutes
from svdengine.server.job import Job
from svdengine.server.model_info import model_info
from svdengine.server.request_log import log_prompt, log_request
from svdengine.server.service import Service
from svdengine.server.token_fields import detokenized, tokenized, tokenizer_info
from svdengine.server.web_files import WEB_FILES, web_routes
from svdengine.server.work import client

T = TypeVar("T")

MakeJob = Callable[[LLM, str, Any], Job]


def create_app(service: Service) -> Starlette:
    """The ASGI application of a service, which it closes at its end."""
    routes = Routes(service)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        service.close()

    middleware = [Middleware(Watch, service=service)]
    origins = service.settings.cors_origins
    if origins:
        # Clients send headers of their own, such as x-stainless-*: whatever a preflight names is allowed.
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(origins),
                allow_methods=["GET", "HEAD", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=["retry-after", "x-request-id", "request-id"],
                allow_private_network=True,
            )
        )
    middleware.append(Middleware(Guard, settings=service.settings))
    handlers: Any = {404: routes.unmatched}
    return Starlette(routes=routes.table(), middleware=middleware, lifespan=lifespan, exception_handlers=handlers)


class Watch:
    """ASGI middleware that counts responses, and turns errors into OpenAI's shape."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._paths = {*WEB_FILES, *(path for path, _, _ in Routes(service).paths())}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["path"] = plain_path(scope["path"])
        client.set(_client_of(scope, bool(self._service.settings.api_keys)))
        status, begin = 0, time.perf_counter()

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        service = self._service
        service.open_responses += 1
        try:
            await self._app(scope, receive, watched_send)
        except (ClientDisconnect, TimeoutError):
            status = status or 499  # nginx's number for a client that went
        finally:
            service.open_responses -= 1
            path = scope["path"] if scope["path"] in self._paths else "other"
            service.metrics.responses[path, status] += 1
            address, seconds = (scope.get("client") or ("",))[0], time.perf_counter() - begin
            log_request(address, scope["method"], scope["path"], status, seconds, page=scope["path"] in WEB_FILES)


def _client_of(scope: Scope, keys: bool) -> str:
    """Whose request it is: an address, and the key where there are keys, as those behind one proxy have."""
    key = Headers(scope=scope).get("authorization", "") if keys else ""
    return f"{(scope.get('client') or ('',))[0]} {key}"


def plain_path(path: str) -> str:
    """A path without the slashes that base addresses of clients bring along."""
    return "/" + "/".join(part for part in path.split("/") if part)


class Routes:
    """The endpoints."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._started = int(time.time())
        self._interfaces = InterfaceRoutes(service, self._run, self._body)
        self._embeddings = EmbeddingRoutes(service, self._body)

    def paths(self) -> list[tuple[str, str, Callable[[Request], Any]]]:
        """Path, method and endpoint."""
        return [
            ("/v1/chat/completions", "POST", self.chat_completions),
            ("/v1/completions", "POST", self.completions),
            ("/v1/models", "GET", self.models),
            ("/v1/models/{name:path}", "GET", self.model),
            ("/tokenize", "POST", self.tokenize),
            ("/detokenize", "POST", self.detokenize),
            ("/tokenizer_info", "GET", self.tokenizer_info),
            ("/health", "GET", self.health),
            ("/metrics", "GET", self.metrics),
            *self._embeddings.paths(),
            *self._interfaces.paths(),
        ]

    def table(self) -> list[Route]:
        """For Starlette."""
        table = [Route(path, self._explained(call), methods=[method]) for path, method, call in self.paths()]
        return [*table, *web_routes(), Route("/{path:path}", self._explained(self.missing), methods=_METHODS)]

    async def chat_completions(self, request: Request) -> Any:
        """Answer a conversation."""
        return await self._run(request, ChatJob)

    async def completions(self, request: Request) -> Any:
        """Complete text."""
        return await self._run(request, CompletionJob)

    async def models(self, _: Request) -> Any:
        """The one model."""
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Any:
        """The same, by name."""
        name = request.path_params["name"]
        if name != self._service.settings.name:
            raise ApiError(404, f"the model {name[:200]!r} is not served here", "model", "model_not_found")
        return _json(self._model())

    async def tokenize(self, request: Request) -> Any:
        """Token ids of a text, or of the prompt of a conversation."""
        return await self._tokens(request, tokenized)

    async def detokenize(self, request: Request) -> Any:
        """Text of token ids."""
        return await self._tokens(request, detokenized)

    async def tokenizer_info(self, _: Request) -> Any:
        """Control tokens and the chat template."""
        return _json(tokenizer_info(self._service.llm))

    async def health(self, _: Request) -> Any:
        """Whether requests are answered."""
        service = self._service
        status = service.condition()
        return _json({"status": status, "version": __version__}, 200 if status == "ok" else 503)

    async def metrics(self, _: Request) -> Any:
        """Counters for Prometheus."""
        return PlainTextResponse(self._service.metrics_text(), media_type=metrics.CONTENT_TYPE)

    async def missing(self, request: Request) -> Any:
        """Whatever else is asked for."""
        path, method = request.url.path, request.method
        right = [m for p, m, _ in self.paths() if p == path]
        if right:
            raise ApiError(405, f"{path} takes {right[0]}, not {method}", headers={"allow": right[0]})
        raise ApiError(404, f"there is no {path[:200]!r} on this server")

    async def unmatched(self, request: Request, _: Exception) -> Any:
        """A path that no route takes, since a line break is in it."""
        return await self._explained(self.missing)(request)

    async def _run(self, request: Request, make: MakeJob) -> Any:
        value = await self._body(request)
        service = self._service
        job = await self._made(request, make, service.llm, service.settings.name, value)
        delivery = service.submit(job)
        if job.options.stream:
            return EventStream(service, job, delivery)
        done = await until_disconnected(request.receive, service.complete(job, delivery))
        if done is None:
            raise ClientDisconnect
        data = await service.in_thread(_encoded, job, done)
        return Response(data, media_type="application/json")

    async def _tokens(self, request: Request, make: Callable[[LLM, BoundedTokenizer, Any], bytes]) -> Response:
        value = await self._body(request)
        data = await self._made(request, make, self._service.llm, self._service.tokenizer, value)
        return Response(data, media_type="application/json")

    async def _made(self, request: Request, function: Callable[..., T], *arguments: Any) -> T:
        """What a function makes in a thread, which is given up when the client goes."""
        made = await until_disconnected(request.receive, _boxed(self._service.in_thread(function, *arguments)))
        if made is None:
            raise ClientDisconnect
        return made[0]

    async def _body(self, request: Request) -> Any:
        """The JSON of a body. Raises ApiError when it is too long, comes too slowly or is no JSON."""
        data = await read_body(request, self._service.settings)
        value = await self._service.in_thread(parse_json, data)
        if self._service.settings.log_prompts:
            log_prompt(request.url.path, value)
        return value

    def _explained(self, endpoint: Callable[[Request], Any]) -> Callable[[Request], Any]:
        async def explained(request: Request) -> Any:
            try:
                return await endpoint(request)
            except ClientDisconnect:
                raise
            except Exception as error:
                told = self._service.error(error)
                return _json(error_body(request.url.path, told), told.status, told.headers)

        return explained

    def _model(self) -> dict[str, Any]:
        llm = self._service.llm
        return {
            "id": self._service.settings.name,
            "object": "model",
            "created": self._started,
            "owned_by": "svdengine",
            "max_model_len": llm.context,
            "chat": llm.model_file.chat_template is not None,
            "svdengine": model_info(llm),
        }


def _encoded(job: Job, done: list[Completion]) -> bytes:
    return encode_json(job.answer(done))


async def _boxed(work: Coroutine[Any, Any, T]) -> tuple[T]:
    return (await work,)


_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


def _json(value: Any, status: int = 200, headers: Any = None) -> Response:
    return Response(encode_json(value), status, dict(headers or {}), media_type="application/json")
