"""Embeddings: /v1/embeddings, and Ollama's /api/embed, of a model's hidden states where the server is told to."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from svdengine.errors import ContextOverflowError
from svdengine.llm import LLM
from svdengine.scheduling.completion import Completion
from svdengine.scheduling.embedding import Embedding, Pooling
from svdengine.scheduling.request import Generation
from svdengine.server.api_error import ApiError, context_overflow
from svdengine.server.body import Body
from svdengine.server.body_schema import read
from svdengine.server.embeddings_fields import EMBEDDINGS, MAX_NUMBERS, MAX_TEXTS, OLLAMA_EMBED
from svdengine.server.framing import DATA_EVENTS, Object
from svdengine.server.job import StreamOptions, check_model
from svdengine.server.ollama_api import check_name
from svdengine.server.request_loop import Update

OFF = (
    "embeddings are off: this server's model generates text; `svdengine serve --embeddings` gives the mean of its"
    " hidden states, which is no trained embedding"
)

_AT_ONCE = 16  # texts of a request that are in the queue together, so that others have their place in it


@dataclass(frozen=True)
class Wanted:
    """What a request asks for."""

    texts: Sequence[str | list[int]]
    pooling: Pooling = "mean"
    base64: bool = False
    cut: bool = False  # leave out what exceeds the context, instead of refusing it


class EmbeddingJob:
    """Some of the texts of a request."""

    framing = DATA_EVENTS
    options = StreamOptions()
    prompt_field = "input"

    def __init__(self, llm: LLM, texts: Sequence[str | list[int]], wanted: Wanted) -> None:
        """Raises ApiError or RequestError."""
        try:
            self.embeddings = [llm.prepare_embedding(text, pooling=wanted.pooling, cut=wanted.cut) for text in texts]
        except ContextOverflowError as error:
            raise context_overflow(error, "input") from error
        self.requests: Sequence[Generation] = self.embeddings

    def opening(self) -> list[Object]:
        """See `Job.opening`. It is never streamed."""
        return []

    def pieces(self, index: int, update: Update) -> list[Object]:
        """See `Job.pieces`."""
        return []

    def closing(self, completions: Sequence[Completion]) -> list[Object]:
        """See `Job.closing`."""
        return []

    def answer(self, completions: Sequence[Completion]) -> Object:
        """See `Job.answer`. The texts of a request are told together, by `openai_answer` or `ollama_answer`."""
        return {}


def read_openai(llm: LLM, name: str, value: Any) -> Wanted:
    """A body for /v1/embeddings. Raises ApiError."""
    fields = read(value, EMBEDDINGS)
    check_model(Body(fields), name)
    _check_dimensions(llm, fields.get("dimensions"))
    texts = _texts(fields["input"])
    _check_count(llm, len(texts))
    return Wanted(texts, fields.get("pooling", "mean"), fields.get("encoding_format") == "base64")


def read_ollama(llm: LLM, name: str, value: Any) -> Wanted:
    """A body for /api/embed. Raises ApiError."""
    fields = read(value, OLLAMA_EMBED)
    check_name(fields["model"], name)
    _check_dimensions(llm, fields.get("dimensions") or None)
    given = fields["input"]
    texts = given if isinstance(given, list) else [given] if given else []  # none: only to load the model
    if not all(texts):
        raise ApiError(400, "input must not hold an empty text", "input", "invalid_value")
    _check_count(llm, len(texts))
    return Wanted(texts, cut=fields.get("truncate", True))


def in_parts(wanted: Wanted, capacity: int) -> Iterator[Sequence[str | list[int]]]:
    """The texts, as many at a time as may wait together; `capacity`: as many as may in all."""
    size = min(_AT_ONCE, capacity)
    for start in range(0, len(wanted.texts), size):
        yield wanted.texts[start : start + size]


def openai_answer(name: str, wanted: Wanted, seconds: float, done: Sequence[Embedding]) -> Object:
    """For /v1/embeddings. It tells no time."""
    data = [
        {"object": "embedding", "index": index, "embedding": _written(embedding, wanted.base64)}
        for index, embedding in enumerate(done)
    ]
    tokens = _token_count(done)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": name, "usage": usage}


def ollama_answer(name: str, wanted: Wanted, seconds: float, done: Sequence[Embedding]) -> Object:
    """For /api/embed, which took so many seconds."""
    return {
        "model": name,
        "embeddings": [_written(embedding, wanted.base64) for embedding in done],
        "total_duration": round(seconds * 1e9),
        "load_duration": 0,
        "prompt_eval_count": _token_count(done),
    }


def _written(embedding: Embedding, as_base64: bool) -> str | list[float]:
    vector = np.asarray(embedding.vector, "<f4")
    return base64.b64encode(vector.tobytes()).decode() if as_base64 else vector.tolist()


def _token_count(done: Sequence[Embedding]) -> int:
    return sum(len(embedding.sequence.tokens) for embedding in done)


def _texts(given: Any) -> list[str | list[int]]:
    """One text or several, each a string or token ids."""
    if isinstance(given, str):
        return [given]
    if all(isinstance(each, int) for each in given):
        return [given]
    if any(isinstance(each, int) for each in given):
        raise ApiError(400, "input must be a string, a list of token ids, or a list of these", "input")
    return list(given)


def _check_count(llm: LLM, count: int) -> None:
    most = min(MAX_TEXTS, MAX_NUMBERS // llm.config.hidden_size)
    if count > most:
        raise ApiError(400, f"input may have {most} items, found {count}", "input", "invalid_value")


def _check_dimensions(llm: LLM, dimensions: int | None) -> None:
    size = llm.config.hidden_size
    if dimensions not in (None, size):
        message = f"dimensions must be {size}: the vectors of this model have {size} numbers and cannot be shortened"
        raise ApiError(400, message, "dimensions", "unsupported_parameter")
