"""Ollama's /api/chat and /api/generate, told of a chat job, or of a completion where no template is wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from svdengine.llm import LLM
from svdengine.scheduling.completion import Completion
from svdengine.server.api_error import ApiError
from svdengine.server.body_schema import read
from svdengine.server.chat_job import ChatJob
from svdengine.server.completion_job import CompletionJob
from svdengine.server.error_form import ollama_error, renamed
from svdengine.server.framing import LINES, Framing, line
from svdengine.server.job import Object, StreamOptions
from svdengine.server.ollama_fields import CHAT, GENERATE
from svdengine.server.ollama_input import NAMES, chat_body, generate_body
from svdengine.server.request_loop import Update
from svdengine.server.said import Said, arguments_object, said_in_answer, said_in_piece


class OllamaJob:
    """The answer to one request. `chat` or not: its text is in a message, or in the field `response`."""

    prompt_field = "messages"

    def __init__(self, llm: LLM, name: str, value: Any, *, chat: bool) -> None:
        """`name`: what the model is called; `value`: the body. Raises ApiError or RequestError."""
        fields = read(value, CHAT if chat else GENERATE)
        check_name(fields["model"], name)
        self._in_message = chat
        self._model = fields["model"]
        self.options = StreamOptions(fields.get("stream", True))
        with renamed(NAMES):
            self._inner = _inner(llm, name, fields, chat)
        self.requests = self._inner.requests if self._inner else []
        quiet = line(self._piece(""))  # readers of lines take an empty one for a fault
        self.framing = Framing(LINES, line, lambda told: [ollama_error(told)], quiet=quiet)
        self._calls: list[Object] = []
        self._arguments: list[str] = []
        self._reason = "load"

    def opening(self) -> list[Object]:
        """See `Job.opening`."""
        return []

    def pieces(self, index: int, update: Update) -> list[Object]:
        """See `Job.pieces`."""
        pieces = self._inner.pieces(index, update) if self._inner else []
        texts = [self._take(said_in_piece(piece)) for piece in pieces]
        return [self._piece(text) for text in texts if text]

    def closing(self, completions: Sequence[Completion]) -> list[Object]:
        """See `Job.closing`. Calls come whole, as clients expect them."""
        calls = self._called()
        before = [self._piece("", calls)] if calls else []
        return [*before, {**self._piece(""), **self._end(completions)}]

    def answer(self, completions: Sequence[Completion]) -> Object:
        """See `Job.answer`."""
        text = self._take(said_in_answer(self._inner.answer(completions))) if self._inner else ""
        return {**self._piece(text, self._called()), **self._end(completions)}

    def _take(self, said: Said) -> str:
        """Note calls and the end; the text."""
        for part in said.calls:
            if part.id is not None:
                self._calls.append({"id": part.id, "function": {"index": len(self._calls), "name": part.name}})
                self._arguments.append("")
            self._arguments[-1] += part.arguments
        if said.finish_reason is not None:
            self._reason = "length" if said.finish_reason == "length" else "stop"
        return said.text

    def _called(self) -> list[Object]:
        """Calls with their arguments."""
        each = zip(self._calls, self._arguments, strict=True)
        return [{**call, "function": {**call["function"], "arguments": arguments_object(text)}} for call, text in each]

    def _piece(self, text: str, calls: Sequence[Object] = ()) -> Object:
        head = {"model": self._model, "created_at": timestamp(datetime.now(UTC))}
        if not self._in_message:
            return {**head, "response": text, "done": False}
        message: Object = {"role": "assistant", "content": text}
        return {**head, "message": {**message, "tool_calls": list(calls)} if calls else message, "done": False}

    def _end(self, completions: Sequence[Completion]) -> Object:
        end = {"done": True, "done_reason": self._reason}
        if not completions:
            return end
        stats = completions[0].stats
        return {
            **end,
            "total_duration": _nanoseconds(stats.seconds),
            "load_duration": 0,
            "prompt_eval_count": stats.prompt_tokens,
            "prompt_eval_duration": _nanoseconds(stats.time_to_first_token),
            "eval_count": stats.generated_tokens,
            "eval_duration": _nanoseconds(stats.seconds - stats.time_to_first_token),
        }


def check_name(given: str, name: str) -> None:
    """Raise ApiError unless it is the model's name, with or without Ollama's tag."""
    if given.removesuffix(":latest") != name:
        raise ApiError(404, f"model {given[:200]!r} not found; this server has {name!r}", "model", "model_not_found")


def timestamp(time: datetime) -> str:
    """As Ollama writes it: RFC 3339 in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _inner(llm: LLM, name: str, fields: Mapping[str, Any], chat: bool) -> ChatJob | CompletionJob | None:
    """What generates the text; None where nothing is asked but to load the model."""
    if chat:
        return ChatJob(llm, name, chat_body(fields)) if fields.get("messages") else None
    if not fields.get("prompt"):
        return None
    if fields.get("raw") or llm.model_file.chat_template is None:
        return CompletionJob(llm, name, generate_body(fields))
    turns = [{"role": role, "content": fields[key]} for role, key in _TURNS if fields.get(key)]
    return ChatJob(llm, name, chat_body({**fields, "messages": turns}))


_TURNS = (("system", "system"), ("user", "prompt"))


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
