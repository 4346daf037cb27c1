"""Responses: /v1/responses, OpenAI's later interface, told of a chat job."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from svdengine.llm import LLM
from svdengine.scheduling.completion import Completion
from svdengine.scheduling.sampling import SamplingParams
from svdengine.server.body_schema import read
from svdengine.server.chat_job import ChatJob
from svdengine.server.error_form import renamed
from svdengine.server.framing import EVENTS, Framing, named_event
from svdengine.server.job import Object, StreamOptions, usage
from svdengine.server.request_loop import Update
from svdengine.server.response_events import ResponseEvents
from svdengine.server.response_store import ResponseStore
from svdengine.server.responses_fields import CREATE
from svdengine.server.responses_input import NAMES, chat_body, input_messages, output_message
from svdengine.server.said import said_in_answer, said_in_piece


class ResponsesJob:
    """The answer to one request for a response."""

    prompt_field = "input"

    def __init__(self, llm: LLM, name: str, value: Any, *, store: ResponseStore) -> None:
        """`name`: what the model is called; `value`: the body. Raises ApiError or RequestError."""
        fields = read(value, CREATE)
        self._store = store
        self._kept = fields.get("store", True)
        self._messages = input_messages(fields["input"])
        before = fields.get("previous_response_id")
        if before is not None:
            self._messages = [*store.get(before, "previous_response_id").messages, *self._messages]
        with renamed(NAMES):
            self._chat = ChatJob(llm, name, chat_body(fields, self._messages))
        self.requests = self._chat.requests
        self.options = StreamOptions(fields.get("stream", False))
        self._events = ResponseEvents(_response(fields, name, self.requests[0].params))
        self.framing = Framing(EVENTS, named_event, self._events.fail)
        self._reason: str | None = None

    def opening(self) -> list[Object]:
        """See `Job.opening`."""
        return self._events.begin()

    def pieces(self, index: int, update: Update) -> list[Object]:
        """See `Job.pieces`."""
        events = []
        for piece in self._chat.pieces(index, update):
            said = said_in_piece(piece)
            self._reason = said.finish_reason or self._reason
            events += self._events.say(said)
        return events

    def closing(self, completions: Sequence[Completion]) -> list[Object]:
        """See `Job.closing`."""
        incomplete = "max_output_tokens" if self._reason == "length" else None
        events = self._events.end(incomplete, _usage(completions))
        if self._kept:
            messages = [*self._messages, output_message(self._events.output)]
            self._store.add(self._events.response(), messages)
        return events

    def answer(self, completions: Sequence[Completion]) -> Object:
        """See `Job.answer`."""
        said = said_in_answer(self._chat.answer(completions))
        self._reason = said.finish_reason
        self._events.say(said)
        self.closing(completions)
        return self._events.response()


def _response(fields: Mapping[str, Any], name: str, params: SamplingParams) -> Object:
    """The response before anything was said: what was asked, as OpenAI repeats it."""
    form = fields.get("text", {}).get("format", {"type": "text"})
    reasoning = fields.get("reasoning", {})
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": fields.get("instructions"),
        "max_output_tokens": fields.get("max_output_tokens"),
        "max_tool_calls": fields.get("max_tool_calls"),
        "metadata": fields.get("metadata", {}),
        "model": name,
        "output": [],
        "parallel_tool_calls": fields.get("parallel_tool_calls", True),
        "previous_response_id": fields.get("previous_response_id"),
        "reasoning": {"effort": reasoning.get("effort"), "summary": reasoning.get("summary")},
        "service_tier": "default",
        "store": fields.get("store", True),
        "temperature": params.temperature,
        "text": {"format": form, "verbosity": "medium"},
        "tool_choice": fields.get("tool_choice", "auto"),
        "tools": [_told_tool(tool) for tool in fields.get("tools", ())],
        "top_logprobs": fields.get("top_logprobs", 0),
        "top_p": params.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": fields.get("user"),
    }


def _told_tool(tool: Mapping[str, Any]) -> Object:
    return {"description": None, "parameters": {}, "strict": True, **tool}


def _usage(completions: Sequence[Completion]) -> Object:
    found = usage(completions, 1)
    return {
        "input_tokens": found["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": found["prompt_tokens_details"]["cached_tokens"]},
        "output_tokens": found["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": found["total_tokens"],
    }
