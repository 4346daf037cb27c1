"""Tools and the form of an answer, from the body of a chat request."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from svdengine.errors import GrammarError
from svdengine.scheduling.sampling import SamplingParams
from svdengine.server.api_error import ApiError, unsupported
from svdengine.server.body import Body
from svdengine.server.sampling_fields import changed
from svdengine.text.grammar import Grammar
from svdengine.text.tool_calls import Tool, tool_grammar

MAX_TOOLS = 128

_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
_FREE = (None, "none", "auto")  # choices that ask for no call
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class ToolUse:
    """The tools that the model is told of, those that it may call, and whether it must, or may more than once."""

    tools: Sequence[Tool] = ()
    allowed: Sequence[Tool] = ()
    required: bool = False
    several: bool = False

    def grammar(self, answer: Grammar | None) -> Grammar:
        """What the model may write, where an answer that is no call must keep to `answer`."""
        return tool_grammar(self.allowed, required=self.required, several=self.several, answer=answer)


def take_tools(body: Body) -> ToolUse:
    """`tools`, `tool_choice` and `parallel_tool_calls`. Raises ApiError."""
    given, choice = body.take("tools", list), body.take_any("tool_choice")
    several = body.take("parallel_tool_calls", bool, True)
    if not given:
        if choice not in _FREE:
            raise ApiError(400, "tool_choice is only for requests with tools", "tool_choice", "invalid_value")
        return ToolUse()
    if len(given) > MAX_TOOLS:
        raise ApiError(400, f"at most {MAX_TOOLS} tools can be given, found {len(given)}", "tools", "invalid_value")
    tools = [_tool(value, f"tools[{i}]") for i, value in enumerate(given)]
    if choice == "none":
        return ToolUse()
    if choice in (None, "auto", "required", "any"):
        return ToolUse(tools, tools, choice in ("required", "any"), several)
    return ToolUse(tools, [_named(choice, tools)], required=True)


def take_answer_form(body: Body, params: SamplingParams, use: ToolUse) -> SamplingParams:
    """`response_format`, the grammar of the tools, or both: a call, or an answer that fits."""
    form = body.take_any("response_format")
    params = changed(params, "response_format", form)
    if not use.allowed:
        return params
    if params.logprobs is not None:
        raise unsupported("logprobs", " together with tools, but with tool_choice none")
    return changed(params, "response_format", use.grammar(params.grammar), "tools")


def grammar_error(error: GrammarError, use: ToolUse) -> ApiError:
    """How a form that no answer can be held to is told: with the field that asked for it."""
    field = "tools" if use.allowed else "response_format"
    if error.schema is not None and use.allowed:
        field = "response_format"
        if error.schema < len(use.allowed):
            field = f"tools[{list(use.tools).index(use.allowed[error.schema])}].function.parameters"
    return ApiError(400, str(error), field, "invalid_value")


def _tool(value: Any, where: str) -> Tool:
    if not isinstance(value, dict):
        raise ApiError(400, f"{where} must be an object", where)
    if value.get("type") != "function":
        raise unsupported(f"{where}.type", f" as {value.get('type')!r:.100}, but as 'function'")
    function = value.get("function")
    if not isinstance(function, dict):
        raise ApiError(400, f"{where}.function must be an object", f"{where}.function")
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        message = f"{where}.function.name must be 1 to 128 letters, digits, _, -, ., : or /"
        raise ApiError(400, message, f"{where}.function.name", "invalid_value")
    if not isinstance(parameters, dict | None):
        message = f"{where}.function.parameters must be a JSON schema, an object"
        raise ApiError(400, message, f"{where}.function.parameters")
    return Tool(name, parameters or _NO_PARAMETERS, {"type": "function", "function": function})


def _named(choice: Any, tools: Sequence[Tool]) -> Tool:
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    if not isinstance(function, dict):
        message = "tool_choice must be none, auto, required or a function by its name"
        raise ApiError(400, message, "tool_choice", "invalid_value")
    for tool in tools:
        if tool.name == function.get("name"):
            return tool
    message = f"tool_choice names {function.get('name')!r:.100}, which is none of the tools"
    raise ApiError(400, message, "tool_choice", "invalid_value")
