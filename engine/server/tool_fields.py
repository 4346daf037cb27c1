"""Tools and the form of an answer, from the body of a chat request."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from svdengine.errors import GrammarError
from svdengine.llm import LLM
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
    """The tools that the model is told of, and the grammar of its answer."""

    tools: Sequence[Tool] = ()
    grammar: Grammar | None = None


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
        return ToolUse(tools, tool_grammar(tools, required=choice in ("required", "any"), several=several))
    named = _named(choice, tools)
    return ToolUse(tools, tool_grammar([named], required=True, several=False))


def take_answer_form(body: Body, params: SamplingParams, use: ToolUse) -> SamplingParams:
    """`response_format`, or the grammar of the tools."""
    form = body.take_any("response_format")
    params = changed(params, "response_format", form)
    if use.grammar is None:
        return params
    if params.grammar is not None:
        raise unsupported("response_format", " together with tools, but with tool_choice none")
    if params.logprobs is not None:
        raise unsupported("logprobs", " together with tools, but with tool_choice none")
    return changed(params, "response_format", use.grammar, "tools")


def grammar_error(error: GrammarError, llm: LLM, params: SamplingParams, use: ToolUse) -> ApiError:
    """How a form that no answer can be held to is told: by the first tool with such parameters, if there is one."""
    for i, tool in enumerate(use.tools if use.grammar is not None else ()):
        grammar = tool_grammar([tool], required=True, several=False)
        try:
            llm.prepare([0], changed(params, "response_format", grammar))
        except GrammarError as found:
            message = f"the parameters of the tool {tool.name!r} cannot be held to: {found}"
            return ApiError(400, message, f"tools[{i}].function.parameters", "invalid_value")
    return ApiError(400, str(error), "tools" if use.grammar is not None else "response_format", "invalid_value")


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
