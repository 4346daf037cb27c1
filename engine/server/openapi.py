"""The OpenAPI document of the server, made of what checks the bodies of requests.

The newer interfaces are checked by schemas, which stand in it as they are. The readers of chat completions and
completions take their fields one by one in code: a body that notes what they take tells their names and kinds, and
`chat_fields` adds what they check further.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from svdengine import __version__
from svdengine.errors import SvdEngineError
from svdengine.llm import LLM
from svdengine.server import embeddings_fields, messages_fields, ollama_fields, responses_fields
from svdengine.server.api_error import ApiError
from svdengine.server.body import NotedFields
from svdengine.server.body_schema import ANY, Schema, choice, flag, listing, mapping, number, text, whole
from svdengine.server.chat_fields import CHAT_DETAILS, COMPLETION_DETAILS, DETOKENIZE, TOKENIZE
from svdengine.server.chat_job import ChatJob
from svdengine.server.completion_job import CompletionJob

_EVENTS = "text/event-stream"
_LINES = "application/x-ndjson"
_COUNT = whole(0, 1 << 62)
_EMBED = "The mean of a chat model's hidden states; only where the server was started with --embeddings."


@dataclass(frozen=True)
class _Operation:
    """A path with a method: what may be sent to it, and what comes back."""

    path: str
    method: str
    summary: str
    answer: Schema
    body: Schema | None = None
    streamed: str | None = None  # the content type of an answer in pieces
    plain: bool = False  # the answer is text, not JSON


def document(llm: LLM, name: str) -> dict[str, Any]:
    """The document, for a server that calls its model `name`."""
    paths: dict[str, Any] = {}
    for operation in [*_openai(llm, name), *_anthropic(), *_ollama(), *_own()]:
        paths.setdefault(operation.path, {})[operation.method] = _described(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "svdengine", "version": __version__, "description": f"The model {name}, over HTTP."},
        "paths": paths,
        "components": {"schemas": _ERRORS, "securitySchemes": _KEYS},
        "security": [{}, *({key: []} for key in _KEYS)],
    }


_KEYS = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}


def _answer(fields: Mapping[str, Schema], *more: str) -> Schema:
    """An object with these fields at least, and others that are named in `more`."""
    return {"type": "object", "properties": dict(fields), "required": [*fields, *more]}


_ERRORS: Mapping[str, Schema] = {
    "Error": _answer({"error": _answer({"message": text(), "type": text()}, "param", "code")}),
    "AnthropicError": _answer({"type": choice("error"), "error": _answer({"type": text(), "message": text()})}),
    "OllamaError": _answer({"error": text()}),
}


def _described(operation: _Operation) -> dict[str, Any]:
    kind = "text/plain" if operation.plain else "application/json"
    content = {kind: {"schema": operation.answer}}
    if operation.streamed is not None:
        content[operation.streamed] = {"schema": ANY}
    error = {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{_error_of(operation.path)}"}}}}
    responses = {
        "200": {"description": "The answer.", "content": content},
        "4XX": {"description": "The request cannot be answered; the error says why.", **error},
        "5XX": {"description": "The server failed, or is ending.", **error},
    }
    found: dict[str, Any] = {"summary": operation.summary, "responses": responses}
    if operation.body is not None:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": operation.body}}}
    if operation.path == "/health":  # it tells as much when it is not well
        responses["503"] = responses["200"]
    names = [part.strip("{}") for part in operation.path.split("/") if part.startswith("{")]
    if names:
        found["parameters"] = [{"name": each, "in": "path", "required": True, "schema": text(1)} for each in names]
    return found


def _error_of(path: str) -> str:
    if path.startswith("/v1/messages"):
        return "AnthropicError"
    return "OllamaError" if path.startswith("/api/") else "Error"


def noted_body(make: Any, llm: LLM, name: str, least: dict[str, Any], details: Mapping[str, Schema]) -> Schema:
    """The schema of a body, from the reader of it. `least`: a body that it takes."""
    notes = NotedFields(least)
    with suppress(ApiError, SvdEngineError):  # such as a model without a chat template: the fields were read by then
        make(llm, name, notes)
    fields = {field: details.get(field, schema) for field, schema in notes.schemas.items()}
    return {"type": "object", "properties": fields, "required": notes.required, "additionalProperties": False}


def _openai(llm: LLM, name: str) -> Sequence[_Operation]:
    least_chat = {"messages": [{"role": "user", "content": "a"}]}
    chat = noted_body(ChatJob, llm, name, least_chat, CHAT_DETAILS)
    completion = noted_body(CompletionJob, llm, name, {"prompt": "a"}, COMPLETION_DETAILS)
    completion["required"] = ["prompt"]
    told = _answer({"id": text(), "object": text(), "created": _COUNT, "choices": listing(mapping()), "usage": ANY})
    model = _answer({"id": text(), "object": choice("model"), "created": _COUNT, "owned_by": text()})
    response = _answer(
        {"id": text(), "object": choice("response"), "status": text(), "output": listing(mapping())}, "usage", "error"
    )
    deleted = _answer({"id": text(), "object": choice("response"), "deleted": flag()})
    embedded = _answer({"object": choice("list"), "data": listing(mapping()), "model": text(), "usage": mapping()})
    return [
        _Operation("/v1/chat/completions", "post", "Answer a conversation.", told, chat, _EVENTS),
        _Operation("/v1/completions", "post", "Complete text.", told, completion, _EVENTS),
        _Operation("/v1/responses", "post", "Answer, and keep the answer.", response, responses_fields.CREATE, _EVENTS),
        _Operation("/v1/responses/{id}", "get", "An answer that is kept.", response),
        _Operation("/v1/responses/{id}", "delete", "Forget an answer.", deleted),
        _Operation("/v1/embeddings", "post", _EMBED, embedded, embeddings_fields.EMBEDDINGS),
        _Operation("/v1/models", "get", "The model.", _answer({"object": choice("list"), "data": listing(model)})),
        _Operation("/v1/models/{name}", "get", "The model, by its name.", model),
    ]


def _anthropic() -> Sequence[_Operation]:
    message = _answer(
        {"id": text(), "type": choice("message"), "role": choice("assistant"), "content": listing(mapping())},
        "stop_reason",
        "usage",
    )
    counted = _answer({"input_tokens": _COUNT})
    return [
        _Operation(
            "/v1/messages", "post", "Answer by Anthropic's interface.", message, messages_fields.CREATE, _EVENTS
        ),
        _Operation(
            "/v1/messages/count_tokens", "post", "Count a prompt's tokens.", counted, messages_fields.COUNT_TOKENS
        ),
    ]


def _ollama() -> Sequence[_Operation]:
    head = {"model": text(), "created_at": text(), "done": flag()}
    chat, generated = _answer({**head, "message": mapping()}), _answer({**head, "response": text()})
    embedded = _answer({"model": text(), "embeddings": listing(listing(number(-1, 1)))})
    shown = _answer({"details": mapping(), "model_info": mapping(), "capabilities": listing(text())})
    return [
        _Operation("/api/chat", "post", "Answer by Ollama's interface.", chat, ollama_fields.CHAT, _LINES),
        _Operation("/api/generate", "post", "Answer a prompt.", generated, ollama_fields.GENERATE, _LINES),
        _Operation("/api/embed", "post", _EMBED, embedded, embeddings_fields.OLLAMA_EMBED),
        _Operation("/api/tags", "get", "The model.", _answer({"models": listing(mapping())})),
        _Operation("/api/show", "post", "More about the model.", shown, ollama_fields.SHOW),
        _Operation("/api/version", "get", "Which Ollama this is like.", _answer({"version": text()})),
    ]


def _own() -> Sequence[_Operation]:
    health = _answer({"status": text(), "version": text()})
    tokens = _answer({"tokens": listing(ANY), "count": _COUNT, "max_model_len": _COUNT})
    return [
        _Operation("/tokenize", "post", "Token ids of a text.", tokens, TOKENIZE),
        _Operation("/detokenize", "post", "Text of token ids.", _answer({"content": text()}), DETOKENIZE),
        _Operation("/tokenizer_info", "get", "The tokenizer, for programs that score texts.", mapping()),
        _Operation("/health", "get", "Whether requests are answered.", health),
        _Operation("/metrics", "get", "Counters for Prometheus.", text(), plain=True),
    ]
