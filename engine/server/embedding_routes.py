"""Routes of embeddings. A request may hold more texts than the queue has places: a few at a time are in it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from svdengine.errors import QueueFullError
from svdengine.llm import LLM
from svdengine.scheduling.embedding import Embedding
from svdengine.server.api_error import ApiError
from svdengine.server.body import encode_json
from svdengine.server.delivery import Delivery
from svdengine.server.embeddings import (
    OFF,
    EmbeddingJob,
    Wanted,
    in_parts,
    ollama_answer,
    openai_answer,
    read_ollama,
    read_openai,
)
from svdengine.server.event_stream import until_disconnected
from svdengine.server.framing import Object
from svdengine.server.service import Service

_Read = Callable[[LLM, str, Any], Wanted]
_Tell = Callable[[str, Wanted, float, Sequence[Embedding]], Object]

_PAUSE_SECONDS = 0.1  # before another try, where others have filled the queue meanwhile


class EmbeddingRoutes:
    """Their endpoints."""

    def __init__(self, service: Service, body: Callable[[Request], Awaitable[Any]]) -> None:
        """`body` reads the body of a request."""
        self._service = service
        self._body = body

    def paths(self) -> list[tuple[str, str, Callable[[Request], Any]]]:
        """Path, method and endpoint."""
        return [("/v1/embeddings", "POST", self.embeddings), ("/api/embed", "POST", self.ollama_embed)]

    async def embeddings(self, request: Request) -> Any:
        """Embed texts by OpenAI's interface."""
        return await self._answer(request, read_openai, openai_answer)

    async def ollama_embed(self, request: Request) -> Any:
        """Embed texts by Ollama's interface."""
        return await self._answer(request, read_ollama, ollama_answer)

    async def _answer(self, request: Request, read: _Read, tell: _Tell) -> Any:
        service, began = self._service, time.monotonic()
        name = service.settings.name
        if not service.settings.embeddings:
            raise ApiError(404, OFF, code="unsupported_endpoint")
        value = await self._body(request)
        wanted = await service.in_thread(read, service.llm, name, value)
        done = await until_disconnected(request.receive, self._embedded(wanted, began))
        if done is None:
            raise ClientDisconnect
        seconds = time.monotonic() - began
        data = await service.in_thread(lambda: encode_json(tell(name, wanted, seconds, done)))
        return Response(data, media_type="application/json")

    async def _embedded(self, wanted: Wanted, began: float) -> list[Embedding]:
        """The embeddings of all texts, in order."""
        service, done = self._service, list[Embedding]()
        deadline = began + service.settings.request_seconds
        for texts in in_parts(wanted, service.settings.capacity):
            if time.monotonic() > deadline:
                message = f"{len(done)} of {len(wanted.texts)} texts were read in the time that a request may take"
                raise ApiError(400, f"{message}; send fewer at a time", "input")
            job = await service.in_thread(EmbeddingJob, service.llm, texts, wanted)
            await service.complete(job, await self._submit(job, deadline if done else began))
            done += job.embeddings
        return done

    async def _submit(self, job: EmbeddingJob, deadline: float) -> Delivery:
        """Have the job run, when the queue has places for it."""
        while True:
            try:
                return self._service.submit(job)
            except QueueFullError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(_PAUSE_SECONDS)
