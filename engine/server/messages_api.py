"""Messages: /v1/messages, Anthropic's interface, told of a chat job."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from svdengine.llm import LLM
from svdengine.scheduling.completion import Completion
from svdengine.server.body import Body
from svdengine.server.body_schema import read
from svdengine.server.chat_job import ChatJob
from svdengine.server.error_form import anthropic_error, renamed
from svdengine.server.framing import EVENTS, Framing, named_event
from svdengine.server.job import Object, StreamOptions, check_model, usage
from svdengine.server.message_events import MessageEvents
from svdengine.server.messages import read_messages
from svdengine.server.messages_fields import COUNT_TOKENS, CREATE
from svdengine.server.messages_input import NAMES, chat_body
from svdengine.server.request_loop import Update
from svdengine.server.said import said_in_answer, said_in_piece
from svdengine.server.tool_fields import take_tools
from svdengine.text.tool_calls import tool_prompt


class MessagesJob:
    """The answer to one request for a message."""

    prompt_field = "messages"

    def __init__(self, llm: LLM, name: str, value: Any) -> None:
        """`name`: what the model is called; `value`: the body. Raises ApiError or RequestError."""
        fields = read(value, CREATE)
        with renamed(NAMES):
            self._chat = ChatJob(llm, name, chat_body(fields))
        self.requests = self._chat.requests
        self.options = StreamOptions(fields.get("stream", False))
        self.framing = Framing(
            EVENTS, named_event, lambda told: [anthropic_error(told)], quiet=named_event({"type": "ping"})
        )
        self._events = MessageEvents(_message(name, len(self.requests[0].sequence.tokens)))
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
        stopped_by = self.requests[0].stop_string
        if self._reason == "length":
            reason = "max_tokens"
        elif self._events.called:
            reason = "tool_use"
        else:
            reason = "end_turn" if stopped_by is None else "stop_sequence"
        return self._events.end(reason, stopped_by if reason == "stop_sequence" else None, _usage(completions))

    def answer(self, completions: Sequence[Completion]) -> Object:
        """See `Job.answer`."""
        said = said_in_answer(self._chat.answer(completions))
        self._reason = said.finish_reason
        self._events.say(said)
        self.closing(completions)
        return self._events.message()


def count_tokens(llm: LLM, name: str, value: Any) -> Object:
    """For /v1/messages/count_tokens: the tokens of the prompt that a request would make, however long."""
    with renamed(NAMES):
        body = Body(chat_body(read(value, COUNT_TOKENS)))
        check_model(body, name)
        messages = read_messages(body.need("messages", list))
        told, variables = tool_prompt(messages, take_tools(body).tools, llm.chat_template)
        return {"input_tokens": len(llm.chat_template.encode(told, **variables))}


def _message(name: str, prompt_tokens: int) -> Object:
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": name,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _counts(prompt_tokens, 0, 0),
    }


def _usage(completions: Sequence[Completion]) -> Object:
    found = usage(completions, 1)
    cached = found["prompt_tokens_details"]["cached_tokens"]
    return _counts(found["prompt_tokens"] - cached, cached, found["completion_tokens"])


def _counts(read_tokens: int, cached: int, generated: int) -> Object:
    """Tokens of the prompt that are read, and that were in the KV cache, apart from each other, as Anthropic has it."""
    return {
        "input_tokens": read_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": generated,
    }
