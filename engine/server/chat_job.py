"""Chat completions: /v1/chat/completions."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from svdengine.errors import GrammarError
from svdengine.llm import LLM
from svdengine.scheduling.completion import Completion
from svdengine.scheduling.sampling import SamplingParams
from svdengine.server.api_error import ApiError
from svdengine.server.body import Body
from svdengine.server.framing import DATA_EVENTS
from svdengine.server.job import Head, Object, StreamOptions, check_model, take_stream_options, usage
from svdengine.server.layer_shares import keep_layers, with_layers
from svdengine.server.logprobs import LogprobTrail
from svdengine.server.messages import read_messages
from svdengine.server.request_loop import Update
from svdengine.server.sampling_fields import (
    MAX_TOP_LOGPROBS,
    changed,
    choice_params,
    take_choices,
    take_length,
    take_neutral,
    take_sampling,
)
from svdengine.server.template_fields import take_template_variables
from svdengine.server.tool_fields import grammar_error, take_answer_form, take_tools
from svdengine.text.tool_calls import ToolCall, ToolCallReader, tool_prompt

# Fields of OpenAI that say nothing about the answer.
_IGNORED = (
    "user",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "store",
    "prediction",
)
_UNSUPPORTED: tuple[str, ...] = (
    "audio",
    "function_call",
    "functions",
    "modalities",
    "moderation",
)
_UNSUPPORTED += ("verbosity", "web_search_options", "service_tier")


class ChatJob:
    """The answers to one conversation."""

    framing = DATA_EVENTS
    prompt_field = "messages"

    def __init__(self, llm: LLM, name: str, value: Any) -> None:
        """`name`: what the model is called; `value`: the body. Raises ApiError or RequestError."""
        body = Body(value)
        check_model(body, name)
        messages = read_messages(body.need("messages", list))
        self.options: StreamOptions = take_stream_options(body)
        self._choices = take_choices(body)
        params = _take_length(body, take_sampling(body, llm.default_params))
        params = _take_logprobs(body, params)
        use = take_tools(body)
        params = take_answer_form(body, params, use)
        template = take_template_variables(body)
        body.only("service_tier", "auto", "default")
        body.only("modalities", ["text"])
        body.only("functions", [])
        body.only("function_call", "none", "auto")  # where there are no functions
        take_neutral(body)
        body.only("verbosity", "medium")
        body.only("add_special_tokens", False)  # a template writes its own
        shift = bool(body.take("context_shift", bool))
        body.ignore(*_IGNORED)
        body.finish(_UNSUPPORTED)
        told, variables = tool_prompt(messages, use.tools, llm.chat_template)
        variables = {**template, **variables}
        each = [choice_params(params, i) for i in range(self._choices)]
        try:
            self.requests = [llm.prepare_chat(told, one, template=variables, context_shift=shift) for one in each]
        except GrammarError as error:
            raise grammar_error(error, use) from error
        keep_layers(self.requests, self.options)
        self._head = Head("chat.completion", name)
        self._readers = [ToolCallReader() if use.allowed else None for _ in self.requests]
        self._trails = [_trail(llm, params) for _ in self.requests]

    def opening(self) -> list[Object]:
        """See `Job.opening`."""
        return [self._piece(i, {"role": "assistant", "content": ""}) for i in range(self._choices)]

    def pieces(self, index: int, update: Update) -> list[Object]:
        """See `Job.pieces`."""
        trail, reader = self._trails[index], self._readers[index]
        entries = trail.push(update.logprobs, update.text) if trail else []
        text, calls = reader.push(update.text) if reader else (update.text, [])
        if reader and update.completion is not None:
            text += reader.flush()
        found = []
        if text or entries or update.layers:
            shape = trail.chat_shape(entries) if trail else None
            piece = self._piece(index, {"content": text}, shape)
            found.append(with_layers(piece, update.layers) if update.layers else piece)
        if reader and calls:
            first = len(reader.calls) - len(calls)
            deltas = [{"index": first + i, **_call_object(call)} for i, call in enumerate(calls)]
            found.append(self._piece(index, {"tool_calls": deltas}))
        if update.completion is not None:
            found.append(self._piece(index, {}, finish_reason=_finish_reason(update.completion, reader)))
        return found

    def closing(self, completions: Sequence[Completion]) -> list[Object]:
        """See `Job.closing`."""
        if not self.options.include_usage:
            return []
        return [{**self._head.object(".chunk"), "choices": [], "usage": usage(completions, self._choices)}]

    def answer(self, completions: Sequence[Completion]) -> Object:
        """See `Job.answer`."""
        choices = [self._choice(i, c) for i, c in enumerate(completions)]
        return {**self._head.object(), "choices": choices, "usage": usage(completions, self._choices)}

    def _choice(self, index: int, completion: Completion) -> Object:
        trail, reader = self._trails[index], self._readers[index]
        shape = trail.chat_shape(trail.push(completion.logprobs or (), completion.text)) if trail else None
        message: Object = {"role": "assistant", "content": completion.text, "refusal": None}
        if reader:
            text = reader.push(completion.text)[0] + reader.flush()
            message["content"] = text or None
            if reader.calls:
                message["tool_calls"] = [_call_object(call) for call in reader.calls]
        reason = _finish_reason(completion, reader)
        return {"index": index, "message": message, "logprobs": shape, "finish_reason": reason}

    def _piece(
        self, index: int, delta: Object, logprobs: Object | None = None, finish_reason: str | None = None
    ) -> Object:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        piece = {**self._head.object(".chunk"), "choices": [choice]}
        return {**piece, "usage": None} if self.options.include_usage else piece


def _call_object(call: ToolCall) -> Object:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}


def _finish_reason(completion: Completion, reader: ToolCallReader | None) -> str:
    called = reader is not None and bool(reader.calls)
    return "tool_calls" if called and completion.finish_reason == "stop" else completion.finish_reason


def _take_length(body: Body, params: SamplingParams) -> SamplingParams:
    old, new = body.take_any("max_tokens"), body.take_any("max_completion_tokens")
    if new is not None:
        return take_length(params, new, "max_completion_tokens")
    return take_length(params, old)


def _take_logprobs(body: Body, params: SamplingParams) -> SamplingParams:
    wanted, top = body.take("logprobs", bool), body.take("top_logprobs", int)
    if top and not wanted:
        raise ApiError(400, "top_logprobs is only for logprobs: true", "top_logprobs")
    if top is not None and not 0 <= top <= MAX_TOP_LOGPROBS:
        message = f"top_logprobs must lie between 0 and {MAX_TOP_LOGPROBS}, found {top}"
        raise ApiError(400, message, "top_logprobs", "invalid_value")
    return changed(params, "logprobs", top or 0) if wanted else params


def _trail(llm: LLM, params: SamplingParams) -> LogprobTrail | None:
    return None if params.logprobs is None else LogprobTrail(llm.tokenizer)
